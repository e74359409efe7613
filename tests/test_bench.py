"""Comparing methods: one decoding for all, the agent's own numbers, runs that resume, tables and pictures."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from agent.bench import runs as module
from agent.bench.costs import optimised, peak_memory
from agent.bench.data import BenchError, Listing, list_images, load_data
from agent.bench.results import Result
from agent.bench.runs import Run, bench, run_one
from agent.bench.tables import mean_and_spread
from agent.cli import main
from agent.commands.bench import settings, split_methods
from agent.config import Config, ConfigError, VrLwf, load
from agent.methods import build
from agent.model.clip import Clip, load_clip
from agent.scoring.evaluator import Evaluator
from agent.scoring.holdout import HoldOut
from exporter.decoders import Decoders
from streams.archive_folder import ArchiveFolder
from tests.tiny import silent

RGB = tuple[int, int, int]
COLORS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (20, 40, 220), "white": (240, 240, 240)}
PROBE = {"yellow sun": (240, 220, 30), "black night": (5, 5, 5), "purple plum": (120, 20, 140)}


def pictures_of(folder: Path, colors: dict[str, RGB], images: int) -> None:
    generator = torch.Generator().manual_seed(len(folder.parts))
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for number in range(images):
            noise = torch.randint(0, 90, (16, 16, 3), generator=generator) + torch.tensor(color) // 2
            Image.fromarray(noise.byte().numpy()).save(folder / name / f"{number}.png")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    pictures_of(tmp_path / "data" / "train", COLORS, 6)
    pictures_of(tmp_path / "data" / "test", COLORS, 5)
    pictures_of(tmp_path / "probe", PROBE, 5)
    return Config.model_validate(
        {
            "model": {"threads": 1},
            "source": {"archive": {"path": tmp_path / "data"}},
            "evaluation": {"probe_archive": tmp_path / "probe"},
        }
    )


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.set_num_threads(1)
    return load_clip(Config().model)


def with_method(config: Config, spec: str) -> Config:
    values = config.model_dump()
    for setting in settings(spec):
        key, _, value = setting.partition("=")
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    return Config.model_validate(values)


def compare(config: Config, specs: list[str], out: Path, seeds: tuple[int, ...] = (0,)) -> str:
    console = Console(file=io.StringIO(), width=200)
    bench(config, {spec: with_method(config, spec) for spec in specs}, seeds, 0, out, console)
    return console.file.getvalue()


def results(out: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (out / "runs").iterdir()}


def test_methods_are_compared_in_a_table_and_pictures(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"

    shown = compare(config, ["zeroshot", "finetune:epochs=1", "joint:epochs=1"], out, seeds=(0, 1))

    rows = {row["method"]: row for row in csv.DictReader((out / "table.csv").open())}
    assert list(rows) == ["zeroshot", "finetune:epochs=1", "joint:epochs=1"]
    assert float(rows["zeroshot"]["retention_mean"]) == 1 and float(rows["zeroshot"]["gap_drift_mean"]) == 0
    assert float(rows["zeroshot"]["trainable_parameters_mean"]) == 0
    assert float(rows["finetune:epochs=1"]["stored_parameters_mean"]) > 0
    assert rows["joint:epochs=1"]["avg_mean"] == "" != rows["joint:epochs=1"]["last_mean"]
    markdown = (out / "table.md").read_text()
    assert "| `finetune:epochs=1` | " in markdown and "over 2 seeds" in markdown
    assert "finetune:epochs=1" in shown and "Last %" in shown
    for name in ("accuracy", "matrices", "gap"):
        picture = ElementTree.parse(out / f"{name}.svg").getroot()
        assert any(
            "finetune:epochs=1" in (text.text or "") for text in picture.iter("{http://www.w3.org/2000/svg}text")
        )
    run = next(run for name, run in results(out).items() if name.startswith("finetune") and run["seed"] == 1)
    assert run["config"]["method"]["finetune"]["epochs"] == 1 and run["config"]["method"]["seed"] == 1
    assert Result.from_json(run).to_json() == run
    assert run["model"]["sha256"] and run["data"] and run["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_numbers_are_those_the_agent_reports(config: Config, clip: Clip, tmp_path: Path) -> None:
    # given a method trained on the listed stream and scored by the agent's own evaluator
    listing = list_images(config)
    data = load_data(listing, clip, config, tmp_path)
    one = with_method(config, "finetune:epochs=2")
    evaluator = Evaluator(
        clip,
        config.evaluation,
        HoldOut(0, 0),
        test=ArchiveFolder(tmp_path / "data", "test"),
        probe=ArchiveFolder(tmp_path / "probe"),
        decoders=Decoders(10**6),
        cache_bytes=2**30,
    )
    method, report, released = build(clip, one.method), None, None
    for task in data.tasks:
        before = evaluator.before(method, released, task, silent)
        update = method.update(task, silent)
        released = method.inference_module()
        report = evaluator.after(method, released, task, update, before, report, silent)

    # when the comparison runs it
    run = Run.of("finetune:epochs=2", one, 0, clip, listing)
    result = run_one(run, tuple(enumerate(data.tasks)), data, clip).to_json()

    # then all scores agree
    assert report is not None
    for mine, reported in zip(result["matrix"], report.matrix, strict=True):
        assert mine == pytest.approx(list(reported))
    for key in ("avg", "last", "forgetting", "backward_transfer", "retention"):
        assert result[key] == pytest.approx(getattr(report, key)), key
    assert result["history"][-1]["zero_shot"] == pytest.approx(report.zero_shot)
    assert result["trainable_parameters"] == result["stored_parameters"] > 0


def test_a_method_that_crops_its_images_is_compared_too(config: Config, tmp_path: Path) -> None:
    row = "vrlwf:loop=published:trainable=all:epochs=1:batch_size=5:lr=1e-4"

    compare(config, [row], tmp_path / "out")

    [run] = results(tmp_path / "out").values()
    assert [entry["epochs"] for entry in run["history"]] == [1, 1] and run["settings"]["vrlwf"]["loop"] == "published"


def test_an_image_is_decoded_once_for_all_methods(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Listing] = []

    def counting(listing: Listing, *rest: object) -> object:
        decoded.append(listing)
        return load_data(listing, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "load_data", counting)

    compare(config, ["zeroshot", "ncm"], tmp_path / "out")

    assert len(decoded) == 1


def test_finished_runs_are_kept_and_only_missing_ones_are_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a comparison of which one run was lost
    out = tmp_path / "out"
    compare(config, ["zeroshot", "ncm"], out)
    table = (out / "table.csv").read_text()
    lost = next(out.glob("runs/ncm-*.json"))
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}

    # when it is run again, then that one comes back and the other is not touched
    compare(config, ["zeroshot", "ncm"], out)
    assert lost.exists() and all(path.stat().st_mtime_ns == then for path, then in kept.items())

    # and once all are there nothing is decoded any more
    monkeypatch.setattr(module, "load_data", None)
    compare(config, ["zeroshot", "ncm"], out)
    assert [row.split(",")[:4] for row in (out / "table.csv").read_text().splitlines()] == [
        row.split(",")[:4] for row in table.splitlines()
    ]


def test_other_settings_and_other_data_are_other_runs(config: Config, clip: Clip, tmp_path: Path) -> None:
    def file(config: Config, seed: int = 0) -> Path:
        return Run.of("finetune", config, seed, clip, list_images(config)).file(tmp_path)

    finetune = with_method(config, "finetune")
    same = finetune.model_copy(update={"state": finetune.state.model_copy(update={"keep_commits": 9})})
    longer = with_method(config, "finetune:epochs=9")
    other_method = with_method(config, "finetune:mgclip.epochs=9")

    first = file(finetune)

    assert file(same) == first == file(other_method)
    assert len({first, file(longer), file(finetune, seed=1)}) == 3
    pictures_of(tmp_path / "data" / "train", {"grey stone": (99, 99, 99)}, 2)
    pictures_of(tmp_path / "data" / "test", {"grey stone": (99, 99, 99)}, 2)
    assert file(finetune) != first


def test_a_method_carries_settings_of_its_row() -> None:
    assert split_methods("ncm, seca:milestones=[2,4]:epochs=5,ncm") == ["ncm", "seca:milestones=[2,4]:epochs=5"]
    assert settings("seca:sg_akt=false") == ["method.name=seca", "method.seca.sg_akt=false"]
    assert settings("mgclip:epochs=2:lora.rank=4")[1:] == ["method.mgclip.epochs=2", "method.lora.rank=4"]
    assert settings("joint:epochs=1") == ["method.name=finetune", "method.finetune.epochs=1"]
    for wrong in ("nothing", "seca:sg_akt"):
        with pytest.raises(ConfigError, match="--methods"):
            settings(wrong)


def test_only_the_first_tasks_can_be_asked_for(config: Config) -> None:
    listing = list_images(config, tasks=1)

    assert len(listing.tasks) == 1 and len(listing.tasks[0]) == 12
    assert {name for name, _ in listing.test} == {name for name, _ in listing.tasks[0]}


def test_data_without_test_images_is_refused(config: Config, tmp_path: Path) -> None:
    flat = config.model_dump()
    flat["source"]["archive"]["path"] = tmp_path / "probe"
    with pytest.raises(BenchError, match="no split folder"):
        list_images(Config.model_validate(flat))
    pictures_of(tmp_path / "alone" / "train", {"grey stone": (99, 99, 99)}, 2)
    flat["source"]["archive"]["path"] = tmp_path / "alone"
    with pytest.raises(BenchError, match=r"no split folder `test` or `val` .* evaluation.test_split"):
        list_images(Config.model_validate(flat))

    pictures_of(tmp_path / "data" / "train", {"grey stone": (99, 99, 99)}, 2)
    with pytest.raises(BenchError, match="no test images of grey stone"):
        list_images(config)


def test_a_task_without_an_image_that_can_be_decoded_is_named(config: Config, clip: Clip, tmp_path: Path) -> None:
    for file in (tmp_path / "data" / "train" / "white").iterdir():
        file.write_bytes(b"nothing")
    flat = config.model_dump()
    flat["source"]["archive"] |= {"classes_per_task": 1, "class_order": ["red", "white", "green", "blue"]}
    broken = Config.model_validate(flat)
    with pytest.raises(BenchError, match=r"^no image of task 2 can be decoded"):
        load_data(list_images(broken), clip, broken, tmp_path)


def test_wrong_arguments_are_a_configuration_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = tmp_path / "order.json"
    order.write_text('{"classes": []}')

    assert main(["bench", "--methods", "nothing"]) == 78
    assert "expected one of bofa" in capsys.readouterr().err
    assert main(["bench", "--methods", "seca:nonsense=1"]) == 78
    assert "method.seca.nonsense" in capsys.readouterr().err
    assert main(["bench", "--order", str(order)]) == 78
    assert "stream_order" in capsys.readouterr().err


def test_an_order_on_the_command_line_wins_over_the_files(config: Config, tmp_path: Path) -> None:
    # given a configuration with a class order, which does not fit the data, and a JSON object with one that does
    file = tmp_path / "bench.toml"
    file.write_text('[source.archive]\nclass_order = ["something else"]\n[model]\nthreads = 1\n')
    order = tmp_path / "order.json"
    order.write_text(json.dumps({"stream_order": ["white", "blue", "green", "red"]}))
    out = tmp_path / "out"

    options = {"--config": file, "--data": tmp_path / "data", "--order": order, "--methods": "zeroshot", "--tasks": 1}
    code = main(["bench", *(str(part) for pair in options.items() for part in pair), "--out", str(out)])

    assert code == 0
    [run] = results(out).values()
    assert [sorted(task) for task in run["tasks"]] == [["blue", "white"]]


def test_parameters_are_counted_where_an_optimiser_steps_them() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(5))
    with optimised() as parameters:
        for _ in range(2):
            used.sum().backward()
            torch.optim.SGD([used], lr=0.1).step()
        torch.optim.SGD([unused], lr=0.1)

    assert sum(p.numel() for p in parameters.values()) == 3


def test_peak_memory_is_seen_though_it_is_freed_again() -> None:
    with peak_memory(torch.device("cpu"), interval_s=0.001) as peak:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        deadline = 200
        while peak() < block.nbytes * 0.9 and deadline:
            deadline -= 1
        del block

        assert peak() >= 0.9 * 64 * 2**20


def test_mean_and_spread_leave_out_what_is_undefined() -> None:
    assert mean_and_spread([0.5, 0.7, None]) == pytest.approx((0.6, 0.1414), abs=1e-4)
    assert mean_and_spread([0.5]) == (0.5, None)
    assert mean_and_spread([None]) == (None, None)


@pytest.mark.parametrize(
    ("name", "classes", "tasks"),
    [("cifar100", 100, 10), ("cub200", 200, 10), ("imagenet-r", 200, 10), ("imagenet100", 100, 10)],
)
def test_the_settings_of_the_papers_can_be_read(name: str, classes: int, tasks: int) -> None:
    path = Path(__file__).parents[1] / "deploy" / "papers" / f"{name}.toml"
    config = load(path, {})

    archive = config.source.archive
    assert len(set(archive.class_order)) == len(archive.class_order) == classes == tasks * archive.classes_per_task
    assert config.model.name == "ViT-B-16" and config.model.pretrained == "openai"
    # and the row that a comment names for the recipe of VR-LwF's paper is that recipe
    (row,) = re.findall(r"--methods (vrlwf:preset\S+)", path.read_text())
    overrides = dict(setting.split("=", 1) for setting in settings(row))
    assert load(path, {}, overrides).method.vrlwf == VrLwf(preset="paper")
