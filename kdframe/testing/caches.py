"""The contract of a cache backend, as tests.

A backend's test module names its settings and pytest does the rest:

    from kdframe.testing.caches import CacheContract
    from my_cache import MyCache

    class TestMyCache(CacheContract):
        def config(self, folder):
            return MyCache(folder=folder)

Files that the backend keeps under `folder` are damaged bit by bit. A backend that keeps nothing on
this machine, or nothing that two processes can share, says so in a class attribute.
"""

from __future__ import annotations

from kdframe.testing.cache_damage import Damage
from kdframe.testing.cache_keeping import Keeping
from kdframe.testing.cache_refusing import Refusing
from kdframe.testing.cache_sharing import Sharing
from kdframe.testing.cache_storing import Storing


class CacheContract(Storing, Sharing, Keeping, Damage, Refusing):
    """The contract: subclass it as `Test…` and answer `config(folder)`.

    Attributes:
        shared_between_processes: False for a backend that lives and dies with one process.
        damaged_files: the damage is done to every file under the folder; False where none is there.
    """
