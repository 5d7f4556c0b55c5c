"""Tiny files in the layouts of public data sets, made here after their published schemas.

Each set is a function that writes its files to a folder, and what its samples must be: (domain, text, images, videos).
The text of a chat is its messages' contents, joined with " | ".
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_pipeline.inputs.reading import JPEG, MP4, PNG

Expected = tuple[str, str, int, int]
ASKED, SAID = "What is it?", "A cat."


@dataclass(frozen=True)
class PublicSet:
    """One set: its name in docs/inputs.md, a writer of its files, and its samples."""

    name: str
    write: Callable[[Path], None]
    samples: Sequence[Expected]


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _lines(path: Path, records: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _table(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _struct(data: bytes = JPEG, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _sharegpt(asked: str = ASKED, said: str = SAID) -> list[dict[str, str]]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def llava_665k(folder: Path) -> None:
    _file(folder / "coco/train2017/000000033471.jpg", JPEG)
    entry = {"id": "000000033471", "image": "coco/train2017/000000033471.jpg"}
    content = [
        {**entry, "conversations": _sharegpt(f"<image>\n{ASKED}")},
        {"id": "wgByO4Y_0", "model": "", "conversations": _sharegpt()},
    ]
    _json(folder / "llava_v1_5_mix665k.json", content)


def llava_video_178k(folder: Path) -> None:
    _file(folder / "academic_source/activitynet/v_1.mp4", MP4)
    entry = {"id": "v_1", "data_source": "0_30_s_activitynet", "video": "academic_source/activitynet/v_1.mp4"}
    _json(folder / "0_30_s_cap.json", [{**entry, "conversations": _sharegpt(f"<image>\n{ASKED}")}])


def the_cauldron(folder: Path) -> None:
    turns = [{"user": ASKED, "assistant": SAID, "source": ""}, {"user": "More?", "assistant": "No.", "source": ""}]
    _table(folder / "textvqa/train-00000-of-00001.parquet", images=[[_struct()]], texts=[turns])


def fine_vision(folder: Path) -> None:
    turns = [{"user": ASKED, "assistant": SAID}]
    _table(
        folder / "ai2d/train-00000-of-00001.parquet",
        images=[[_struct(), _struct(PNG)]],
        texts=[turns],
        source=["ai2d"],
        relevance_ratings=[[5]],
        relevance_min=[5],
    )


def docmatix(folder: Path) -> None:
    turns = [{"user": ASKED, "assistant": SAID, "source": "PDFA key: 1"}]
    _table(folder / "data/train-00000-of-00200.parquet", images=[[_struct(path="1.jpg")]], texts=[turns])


def obelics(folder: Path) -> None:
    _file(folder / "cat.jpg", JPEG)
    _table(
        folder / "train-00000.parquet",
        images=[[None, "cat.jpg", None]],
        metadata=["[]"],
        general_metadata=["{}"],
        texts=[["A cat", None, "and a dog."]],
    )


def mmc4(folder: Path) -> None:
    _file(folder / "cat.jpg", JPEG)
    info = [{"image_name": "cat.jpg", "raw_url": "http://x/cat.jpg", "matched_text_index": 1, "matched_sim": 0.3}]
    record = {"url": "http://x", "text_list": ["A cat", "and a dog."], "image_info": info, "similarity_matrix": [[0.1]]}
    _lines(folder / "docs_shard_0_v2.jsonl", [record])


def mint(folder: Path) -> None:
    document = {"texts": ["A cat", None], "images": [None, "cat.jpg"], "url": "http://x"}
    _lines(folder / "mint.jsonl", [document])
    _file(folder / "cat.jpg", JPEG)


def img2dataset(folder: Path) -> None:
    said = {"caption": "A cat.", "url": "http://x/a.jpg", "key": "000000000", "status": "success", "width": 60}
    _tar(
        folder / "00000.tar",
        {"000000000.jpg": JPEG, "000000000.json": json.dumps(said).encode(), "000000000.txt": b"A cat."},
    )
    _table(folder / "00000.parquet", url=["http://x/a.jpg"], caption=["A cat."], key=["000000000"], status=["success"])
    _json(folder / "00000_stats.json", {"count": 1})


def _coco(folder: Path, annotations: list[dict[str, Any]], name: str) -> None:
    _file(folder / "val2017/000000000139.jpg", JPEG)
    image = {"id": 139, "file_name": "000000000139.jpg", "width": 60, "height": 40, "coco_url": "http://x"}
    content = {"info": {}, "licenses": [], "images": [image], "annotations": annotations}
    _json(folder / name, {**content, "categories": [{"supercategory": "animal", "id": 17, "name": "cat"}]})


def coco_instances(folder: Path) -> None:
    box = {"segmentation": [], "area": 9, "iscrowd": 0, "image_id": 139, "bbox": [6, 4, 30, 20], "category_id": 17}
    _coco(folder, [{**box, "id": 1}], "annotations/instances_val2017.json")


def coco_captions(folder: Path) -> None:
    captions = [{"image_id": 139, "id": number, "caption": text} for number, text in enumerate((SAID, "Two."))]
    _coco(folder, captions, "annotations/captions_val2017.json")


def objects365(folder: Path) -> None:
    _file(folder / "images/v1/patch0/objects365_v1_00000001.jpg", JPEG)
    image = {"id": 1, "file_name": "images/v1/patch0/objects365_v1_00000001.jpg", "width": 60, "height": 40, "url": ""}
    box = {"id": 1, "iscrowd": 0, "isfake": 0, "area": 1, "image_id": 1, "bbox": [6, 4, 30, 20], "category_id": 3}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "cat"}], "licenses": []}
    _json(folder / "zhiyuan_objv2_val.json", content)


def flickr30k(folder: Path) -> None:
    _table(
        folder / "TEST-00000-of-00009.parquet",
        image=[_struct(path="1.jpg")],
        caption=[[SAID, "Two."]],
        sentids=[["0", "1"]],
        split=["train"],
        img_id=["0"],
        filename=["1.jpg"],
    )


def synthdog(folder: Path) -> None:
    truth = json.dumps({"gt_parse": {"text_sequence": "A cat."}})
    _table(folder / "train-00000-of-00084.parquet", image=[_struct()], ground_truth=[truth])


def m4_instruct(folder: Path) -> None:
    for number, data in enumerate((JPEG, PNG)):
        _file(folder / f"HQ-Edit/{number}.jpg", data)
    entry = {"sample_id": 0, "image": ["HQ-Edit/0.jpg", "HQ-Edit/1.jpg"], "metadata": {"dataset": "HQ-Edit"}}
    _json(folder / "m4_instruct_annotations.json", [{**entry, "conversations": _sharegpt(f"<image><image>{ASKED}")}])


def sharegpt4v(folder: Path) -> None:
    _file(folder / "sam/images/sa_1.jpg", JPEG)
    entry = {"id": "sa_1", "image": "sam/images/sa_1.jpg", "conversations": _sharegpt(f"{ASKED}\n<image>")}
    _json(folder / "sharegpt4v_instruct_gpt4-vision_cap100k.json", [entry])


def websight(folder: Path) -> None:
    _table(
        folder / "train-00000-of-00738.parquet",
        image=[_struct()],
        text=["<html></html>"],
        llm_generated_idea=["A page"],
    )


def llama_factory(folder: Path) -> None:
    _file(folder / "mllm_demo_data/1.jpg", JPEG)
    turns = [{"role": "user", "content": f"<image>{ASKED}"}, {"role": "assistant", "content": SAID}]
    _json(folder / "mllm_demo.json", [{"messages": turns, "images": ["mllm_demo_data/1.jpg"]}])


def alpaca(folder: Path) -> None:
    _json(folder / "alpaca_en_demo.json", [{"instruction": "What is", "input": "it?", "output": SAID}])


def glm_v_finetune(folder: Path) -> None:
    _file(folder / "1.jpg", JPEG)
    asked = [{"type": "image", "image": "1.jpg"}, {"type": "text", "text": ASKED}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": SAID}]
    _json(folder / "finetune.json", [{"messages": turns}])


def geometry3k_of_verl(folder: Path) -> None:
    problem = "<image>Find x."
    boxed = r" You FIRST think. The final answer MUST BE put in \boxed{}."
    _table(
        folder / "train.parquet",
        data_source=["hiyouga/geometry3k"],
        prompt=[[{"content": problem + boxed, "role": "user"}]],
        images=[[_struct()]],
        ability=["math"],
        reward_model=[{"ground_truth": "7", "style": "rule"}],
        extra_info=[{"answer": "7", "index": 0, "question": problem, "split": "train"}],
    )


def llava_onevision(folder: Path) -> None:
    _table(
        folder / "ai2d/train-00000-of-00001.parquet",
        id=["1"],
        image=[_struct(path="1.jpg")],
        conversations=[_sharegpt(f"<image>\n{ASKED}")],
        data_source=["ai2d"],
    )


def fineweb(folder: Path) -> None:
    _table(folder / "000_00000.parquet", text=["A document."], id=["1"], dump=["CC"], url=["http://x"], token_count=[3])


def c4(folder: Path) -> None:
    _lines(folder / "c4-train.00000.jsonl", [{"text": "A document.", "timestamp": "2019-04-25", "url": "http://x"}])


def cc3m(folder: Path) -> None:
    _tar(folder / "cc3m-train-0000.tar", {"0.jpg": JPEG, "0.json": b'{"caption": "A cat."}', "0.txt": b"A cat."})


def image_folder(folder: Path) -> None:
    _file(folder / "train/1.jpg", JPEG)
    text = io.StringIO()
    csv.writer(text).writerows([["file_name", "text"], ["1.jpg", SAID]])
    (folder / "train/metadata.csv").write_text(text.getvalue())


def grit(folder: Path) -> None:
    chunks = [[0, 5, 0.1, 0.2, 0.5, 0.6, 0.9]]
    said = {"caption": SAID, "noun_chunks": chunks, "ref_exps": chunks, "width": 60, "height": 40, "key": "0"}
    _tar(folder / "00000.tar", {"0.jpg": JPEG, "0.json": json.dumps(said).encode(), "0.txt": SAID.encode()})


def screenspot(folder: Path) -> None:
    _file(folder / "screenspotv2_image/web_1.png", PNG)
    where = {"img_filename": "web_1.png", "bbox": [4, 6, 20, 30], "data_type": "icon", "data_source": "shop"}
    _json(folder / "screenspot_web_v2.json", [{**where, "instruction": "close the tab"}])


def refcoco(folder: Path) -> None:
    _table(
        folder / "val-00000-of-00004.parquet",
        question_id=["1"],
        image=[_struct(path="COCO_train2014_000000000001_0.jpg")],
        question=["Give a caption of the region."],
        answer=[["left cat"]],
        segmentation=[[1.0, 2.0]],
        bbox=[[6.0, 4.0, 30.0, 20.0]],
        iscrowd=[0],
        file_name=["COCO_train2014_000000000001.jpg"],
    )


def visual_genome(folder: Path) -> None:
    _file(folder / "VG_100K_2/1.jpg", JPEG)
    region = {"region_id": 1382, "image_id": 1, "phrase": "the cat is green", "x": 6, "y": 4, "width": 30, "height": 20}
    _json(folder / "region_descriptions.json", [{"id": 1, "regions": [region]}])


def entities(folder: Path) -> None:
    _file(folder / "flickr30k-images/36979.jpg", JPEG)
    _file(folder / "Flickr30kEntities/Sentences/36979.txt", b"[/EN#1/animals A cat] sleeps .\n")
    box = "<bndbox><xmin>7</xmin><ymin>5</ymin><xmax>36</xmax><ymax>24</ymax></bndbox>"
    size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
    xml = f"<annotation>{size}<object><name>1</name>{box}</object></annotation>"
    _file(folder / "Flickr30kEntities/Annotations/36979.xml", xml.encode())


CHAT = ("chat", f"{ASKED} | {SAID}")
SETS: tuple[PublicSet, ...] = (
    PublicSet("LLaVA-665K", llava_665k, [("chat", f"<image>\n{ASKED} | {SAID}", 1, 0), (*CHAT, 0, 0)]),
    PublicSet("LLaVA-Video-178K", llava_video_178k, [("chat", f"<video>\n{ASKED} | {SAID}", 0, 1)]),
    PublicSet("LLaVA-OneVision", llava_onevision, [("chat", f"<image>\n{ASKED} | {SAID}", 1, 0)]),
    PublicSet("The Cauldron", the_cauldron, [("chat", f"<image>{ASKED} | {SAID} | More? | No.", 1, 0)]),
    PublicSet("FineVision", fine_vision, [("chat", f"<image><image>{ASKED} | {SAID}", 2, 0)]),
    PublicSet("Docmatix", docmatix, [("chat", f"<image>{ASKED} | {SAID}", 1, 0)]),
    PublicSet("M4-Instruct", m4_instruct, [("chat", f"<image><image>{ASKED} | {SAID}", 2, 0)]),
    PublicSet("ShareGPT4V", sharegpt4v, [("chat", f"{ASKED}\n<image> | {SAID}", 1, 0)]),
    PublicSet("LLaMA-Factory's mllm_demo", llama_factory, [("chat", f"<image>{ASKED} | {SAID}", 1, 0)]),
    PublicSet("Alpaca", alpaca, [("chat", f"What is\nit? | {SAID}", 0, 0)]),
    PublicSet("GLM-V's finetune.json", glm_v_finetune, [("chat", f"<image>{ASKED} | {SAID}", 1, 0)]),
    PublicSet("Geometry3K as verl's script writes it", geometry3k_of_verl, [("rl", "<image>Find x.", 1, 0)]),
    PublicSet("OBELICS", obelics, [("interleaved", "A cat\n\n<image>\n\nand a dog.", 1, 0)]),
    PublicSet("MMC4", mmc4, [("interleaved", "A cat\n\n<image>\n\nand a dog.", 1, 0)]),
    PublicSet("MINT-1T", mint, [("interleaved", "A cat\n\n<image>", 1, 0)]),
    PublicSet("LAION, DataComp", img2dataset, [("image_text", SAID, 1, 0)]),
    PublicSet("CC3M", cc3m, [("image_text", SAID, 1, 0)]),
    PublicSet("COCO captions", coco_captions, [("image_text", SAID, 1, 0), ("image_text", "Two.", 1, 0)]),
    PublicSet("Flickr30k", flickr30k, [("image_text", SAID, 1, 0), ("image_text", "Two.", 1, 0)]),
    PublicSet("Hugging Face imagefolder", image_folder, [("image_text", SAID, 1, 0)]),
    PublicSet("WebSight", websight, [("ocr", "<html></html>", 1, 0)]),
    PublicSet("SynthDoG", synthdog, [("ocr", SAID, 1, 0)]),
    PublicSet("COCO instances", coco_instances, [("grounding", "<image>cat [[100,100,600,600]]", 1, 0)]),
    PublicSet("Objects365", objects365, [("grounding", "<image>cat [[100,100,600,600]]", 1, 0)]),
    PublicSet("GRIT", grit, [("grounding", "<image>A cat [[100,200,500,600]].", 1, 0)]),
    PublicSet("ScreenSpot-v2", screenspot, [("grounding", "<image>close the tab [[100,100,600,600]]", 1, 0)]),
    PublicSet("RefCOCO", refcoco, [("grounding", "<image>left cat [[100,100,600,600]]", 1, 0)]),
    PublicSet("Visual Genome", visual_genome, [("grounding", "<image>the cat is green [[100,100,600,600]]", 1, 0)]),
    PublicSet("Flickr30k Entities", entities, [("grounding", "<image>A cat [[100,100,600,600]] sleeps .", 1, 0)]),
    PublicSet("FineWeb", fineweb, [("text", "A document.", 0, 0)]),
    PublicSet("C4", c4, [("text", "A document.", 0, 0)]),
)
