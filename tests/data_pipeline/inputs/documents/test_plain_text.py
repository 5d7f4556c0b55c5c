"""Plain text files, one sample each."""

from __future__ import annotations

from data_pipeline.inputs.documents.plain_text import TextFiles
from data_pipeline.inputs.draft import Draft, Rejected


def outcomes(kind: TextFiles) -> list[Draft | Rejected]:
    return [outcome for unit in kind.units() for outcome in kind.read(unit)]


def test_text_files_must_be_utf8_and_not_empty(tmp_path, monkeypatch):
    for name, content in {
        "a.txt": "\ufeffOne line.\r\nAnother, with <image>.\n".encode(),
        "b.txt": b" \n",
        "c.txt": "Käse".encode("latin-1"),
        "d.txt": "words".encode("utf-16-le"),
    }.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path.parent)
    assert isinstance(outcomes(TextFiles((f"{tmp_path.name}/a.txt",)))[0], Draft)
    draft, *rejected = outcomes(TextFiles(tuple(str(tmp_path / f"{name}.txt") for name in "abcd")))
    assert draft == Draft({"domain": "text", "text": "One line.\nAnother, with <image>."}, origin="a.txt")
    assert [(r.origin, r.reason) for r in rejected if isinstance(r, Rejected)] == [
        ("b.txt", "empty_document"),
        ("c.txt", "not_utf8"),
        ("d.txt", "not_utf8"),
    ]
