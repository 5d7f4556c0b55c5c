"""The registry of input kinds: which kind reads a path, and the options of kinds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Unit
from data_pipeline.inputs.kinds import INPUTS, Kind, describe_kinds, open_inputs
from data_pipeline.inputs.records.jsonl import JsonLines
from data_pipeline.inputs.records.tars import Tars
from data_pipeline.sharding.tasks import MIN_TASK_BYTES, SMALL_BUILD_TASKS, cut_tasks
from tests.data_pipeline.inputs.reading import opened

pytestmark = pytest.mark.fast


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def kinds_of(*paths: Path, kind: str = "") -> list[str]:
    return [name for name, _ in open_inputs([str(path) for path in paths], kind)]


def test_kind_is_found_from_suffixes_and_folder_content(tmp_path):
    touch(tmp_path, "a/x.jsonl", "a/sub/y.jsonl", "b/1.jpg", "b/metadata.jsonl", "c/s.tar", "c/t.jsonl")
    [(kind, given)] = open_inputs([str(tmp_path / "a")])
    assert (kind, given) == ("jsonl", JsonLines((str(tmp_path / "a/sub/y.jsonl"), str(tmp_path / "a/x.jsonl"))))
    assert kinds_of(tmp_path / "b", tmp_path / "a/x.jsonl") == ["folder", "jsonl"]
    assert kinds_of(tmp_path / "c", kind="tars") == ["tars"]
    assert kinds_of(tmp_path / "b/1.jpg") == ["folder"]


def test_img2dataset_reports_do_not_count_as_inputs(tmp_path):
    touch(tmp_path, "00000.tar", "00000.parquet", "00000_stats.json")
    assert open_inputs([str(tmp_path)]) == [("tars", Tars((str(tmp_path / "00000.tar"),)))]
    touch(tmp_path, "00001.parquet")
    with pytest.raises(DataError, match=r"holds files of several kinds .*parquet"):
        open_inputs([str(tmp_path)])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("c", "holds files of several kinds .*jsonl.*: choose one with --kind"),
        ("d", "holds no file of a known kind"),
        ("d/readme", "the kind of .*readme is unknown: name it with --kind"),
        ("gone", "gone does not exist"),
        ("dpi=3", "does not exist: write --set before every option=value"),
        ("packed/a.jsonl.gz", "is compressed.* with gunzip"),
        ("packed", r"no file of a known kind \(unpack a.jsonl.gz first with gunzip\)"),
    ],
)
def test_path_without_one_kind_is_refused(tmp_path, path, message):
    touch(tmp_path, "c/s.tar", "c/t.jsonl", "d/readme", "packed/a.jsonl.gz")
    with pytest.raises(DataError, match=message):
        open_inputs([str(tmp_path / path)])


def test_folder_without_files_of_the_kind_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no files of kind pdf \(.pdf\)"):
        open_inputs([str(tmp_path)], "pdf")
    [(_, given)] = open_inputs([str(tmp_path)], "grounding")
    with pytest.raises(DataError, match=r"is no folder of Flickr30k Entities \(Sentences, Annotations\): give that"):
        given.units()
    with pytest.raises(DataError, match="contains no PDFs"):
        open_inputs([str(tmp_path)], "pages")[0][1].units()


def test_every_kind_is_described_in_one_line_and_can_be_loaded():
    lines = describe_kinds().splitlines()
    assert [line.split()[0].rstrip("*") for line in lines] == list(INPUTS)
    assert all(kind.load().__dataclass_fields__["paths"] for kind in INPUTS.values())


@dataclass(frozen=True)
class Sheets:
    """A kind with an option of every type."""

    paths: tuple[str, ...]
    dpi: int = 72
    scale: float = 1.0
    figures: bool = True
    fonts: tuple[str, ...] = ()
    style: Literal["plain", "scan"] = "plain"
    language: str | None = None


@pytest.fixture
def sheet(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(INPUTS, "sheets", Kind(f"{__name__}:Sheets", (".sheet",), "for this test"))
    touch(tmp_path, "a.sheet")
    return tmp_path / "a.sheet"


def test_settings_are_parsed_to_the_types_of_the_fields(sheet):
    settings = ["dpi=150", "scale=0.5", "figures=no", "fonts=A, B", "style=scan", "language=de"]
    assert opened(sheet, settings=settings) == Sheets((str(sheet),), 150, 0.5, False, ("A", "B"), "scan", "de")


def test_setting_goes_to_every_kind_that_has_the_option(sheet, tmp_path):
    touch(tmp_path, "a.pdf", "a.jsonl")
    paths = [str(sheet), str(tmp_path / "a.pdf"), str(tmp_path / "a.jsonl")]
    by_kind = dict(open_inputs(paths, settings=["dpi=90"]))
    assert by_kind["sheets"] == Sheets((str(sheet),), dpi=90)
    assert getattr(by_kind["pdf"], "dpi", None) == 90
    assert by_kind["jsonl"] == JsonLines((paths[2],))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dpy=3", "no such option of kind sheets: did you mean dpi"),
        ("zzz=3", "options are dpi, figures, fonts, language, scale, style"),
        ("dpi=many", "--set dpi=many: give a whole number"),
        ("figures=maybe", "--set figures=maybe: give true or false"),
        ("style=bold", "use one of plain, scan"),
        ("dpi", "write option=value"),
    ],
)
def test_wrong_setting_is_refused(sheet, setting, message):
    with pytest.raises(DataError, match=message):
        opened(sheet, settings=[setting])


def test_setting_that_is_given_twice_is_refused(sheet):
    with pytest.raises(DataError, match=r"--set fonts is given twice: .* fonts=A,B"):
        opened(sheet, settings=["fonts=A", "dpi=90", "fonts=B"])


def test_tasks_have_equal_sizes_for_any_units():
    units = [(0, Unit("a", number, number + 1, bytes=1 << 20)) for number in range(1000)]
    tasks = cut_tasks(units, 100 << 20)
    assert [unit for task in tasks for unit in task.units] == units
    assert [task.number for task in tasks] == list(range(SMALL_BUILD_TASKS))
    assert max(task.bytes for task in tasks) - min(task.bytes for task in tasks) <= 1 << 20
    assert len(cut_tasks(units, 10 << 20)) == 100
    assert {task.bytes for task in cut_tasks(units[:40], 1 << 30)} <= {13 << 20, 14 << 20}
    assert len(cut_tasks([(0, Unit("a", bytes=MIN_TASK_BYTES - 1))], 1 << 30)) == 1
    assert len(cut_tasks([(0, Unit("a")), (0, Unit("b"))], 1 << 30)) == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tars", "folder"])
def test_a_kind_of_records_is_loaded_without_torch(kind: str) -> None:
    program = f"import sys; from data_pipeline.inputs.kinds import INPUTS; INPUTS[{kind!r}].load(); print(sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "data_pipeline.inputs.records." in loaded
    assert "'torch'" not in loaded


def test_files_about_the_data_do_not_decide_the_kind(tmp_path: Path) -> None:
    about = ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", "dataset_infos.json", "README.html")
    for name, file in (("folder", "a.jpg"), ("tars", "0.tar"), ("parquet", "data/x.parquet"), ("pdf", "b.pdf")):
        touch(tmp_path / name, file, *about)
        assert kinds_of(tmp_path / name) == [name]
    touch(tmp_path / "m", "README.md")
    assert kinds_of(tmp_path / "m") == ["markdown"]


def test_annotations_beside_a_folder_of_images_are_asked_for_with_the_exact_option(tmp_path: Path) -> None:
    touch(tmp_path / "coco", "ann.json", "images/1.jpg", "images/2.jpg")
    with pytest.raises(DataError, match="several kinds") as caught:
        open_inputs([str(tmp_path / "coco")])
    assert f"--kind jsonl      --input {tmp_path}/coco/ann.json" in str(caught.value)
    assert f"--kind folder     --input {tmp_path}/coco   2 files, such as images/1.jpg" in str(caught.value)
    touch(tmp_path / "pets", "images/1.jpg", "images/1.json", "images/metadata.jsonl")
    assert kinds_of(tmp_path / "pets") == ["folder"]


def test_programs_in_typescript_are_no_videos(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.ts").write_text("const a = 1")
    touch(tmp_path / "code", "b.html")
    assert kinds_of(tmp_path / "code") == ["html"]
