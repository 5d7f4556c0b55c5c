"""Plain text files: one sample of domain `text` per file.

python -m tools.shard build --input books/ --kind text --out shards/books --tokenizer TOKENIZER
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import ONE_FILE, Draft, Rejected, Unit
from data_pipeline.inputs.flow import file_units, read_text
from data_pipeline.inputs.names import shown_names


@dataclass(frozen=True)
class TextFiles:
    r"""UTF-8 text files. Line ends become \n."""

    paths: tuple[str, ...]

    def units(self) -> Sequence[Unit]:
        """Return one unit per file."""
        return file_units(self.paths)

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Return one file."""
        return ONE_FILE

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the sample of a file."""
        origin = shown_names(self.paths)[unit.path]
        try:
            text = read_text(unit.path).strip()
            if not text:
                raise BadSample("empty_document", "it contains no text")
            yield Draft({"domain": "text", "text": text}, origin=origin, items=ONE_FILE)
        except BadSample as error:
            yield Rejected(origin, error.reason, error.detail, ONE_FILE)
