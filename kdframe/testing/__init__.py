"""What an author of a plugin runs to know that it keeps its contract.

Each kind of part has a module of its own, which needs the extra: `pip install 'kdframe[testing]'`.
"""

from __future__ import annotations

import sys

if "pytest" in sys.modules:  # a process that only writes rows does without
    sys.modules["pytest"].register_assert_rewrite(
        "kdframe.testing.cache_storing",
        "kdframe.testing.cache_sharing",
        "kdframe.testing.cache_keeping",
        "kdframe.testing.cache_damage",
        "kdframe.testing.cache_refusing",
        "kdframe.testing.losses",
    )
