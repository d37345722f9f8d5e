"""Export as a plain Hugging Face folder."""

from __future__ import annotations

from typing import Literal

from kdframe.api import Exporter, ExporterConfig, hookimpl


class HfExport(ExporterConfig):
    """A plain `save_pretrained` folder: safetensors, tokenizer, chat template, generation config
    and a model card; loaded back and compared."""

    kind: Literal["hf"] = "hf"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the written weights."""

    def build(self) -> Exporter:
        """The exporter."""
        from kdframe_hf_export.exporter import HfExporter

        return HfExporter(self.dtype)


@hookimpl
def kdframe_exporters() -> tuple[type[ExporterConfig], ...]:
    """The Hugging Face folder."""
    return (HfExport,)
