"""`fpnx benchmark`: samples, tables, JSON and refused requests. No test depends on measured times."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fpnx
from fpnx.benchmark.plot import draw_stages
from fpnx.benchmark.profiling import Cost, count_costs, count_executed
from fpnx.benchmark.results import BenchmarkResult, CaseResult
from fpnx.benchmark.roofline import MatrixProduct, write_speed
from fpnx.benchmark.synthetic_images import link_images, make_images
from fpnx.benchmark.timers import PeakMemory, Percentiles, percentiles
from fpnx.cli.benchmark_view import show_benchmark
from fpnx.commands.benchmark import benchmark
from fpnx.core.config import BenchmarkConfig, ExtractConfig
from fpnx.core.errors import FpnxError, Interrupted
from fpnx.core.events import Listener
from fpnx.core.plan_summary import LevelShape
from fpnx.inference.graph_fusion import fuse_model
from tests.helpers.measuring import measure_briefly
from tests.helpers.process import document

TINY: dict[str, Any] = {"backbone": "mobilenet_v2", "size": 64, "channels": 8, "repeats": 2, "workers": 2}
READING = ["decode", "resize + normalise", "copy to device"]
NETWORK = ["C2", "C3", "C4", "C5", "lateral + top-down", "output P2", "output P5", "top block"]
WRITING = ["copy back", "write"]


@pytest.fixture(scope="module", autouse=True)
def _briefly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        measure_briefly(patch)
        yield


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResult:
    """Two precisions, a batch size that does not fit, and the plain script, on small images of which one is bad."""
    folder = tmp_path_factory.mktemp("few")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (72, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpnx.benchmark.case.available_memory", lambda: 256 << 20)  # a small machine
        return benchmark(
            **TINY,
            levels="P2,C3,P5,P6",
            precision="float32,bfloat16",
            batch_size="2,4096",
            images=str(folder),
            baseline="plain",
        )


def test_every_stage_of_every_configuration_has_its_samples(result: BenchmarkResult) -> None:
    names = [case.name for case in result.cases]
    kinds = ["float32 batch 2", "float32 batch 4096", "bfloat16 batch 2", "bfloat16 batch 4096", "plain script batch 2"]
    assert names == [f"mobilenet_v2 {kind}" for kind in kinds]
    assert result.rounds == 2
    for case in result.cases[0], result.cases[2]:
        assert list(case.stages) == [*READING, *NETWORK, *WRITING]
        assert case.forward_stages == NETWORK
        assert all(len(samples) == 2 * 3 for samples in case.stages.values())
        assert all(sample > 0 for samples in case.stages.values() for sample in samples)
        assert len(case.forward) == len(case.core) == 2 * 3
        assert min(case.core) > 0
        assert len(case.end_to_end) == 2
        assert case.images % 2 == 0
        assert case.images >= 32
        assert case.rss is not None
        assert case.rss > 50e6
        assert case.cuda is None
    assert [len(samples) for samples in result.ceilings.values()] == [6, 6]
    assert list(result.ceilings) == ["float32", "bfloat16"]
    assert len(result.disk) == 2


def test_a_batch_that_does_not_fit_is_named_and_skipped(result: BenchmarkResult) -> None:
    for case in result.cases[1], result.cases[3]:
        assert case.reason is not None
        assert case.reason.startswith("does not fit: it needs about ")
        assert not case.stages
        assert not case.end_to_end


@pytest.mark.slow
def test_kinds_of_pyramid_are_columns_of_one_table(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fpnx.cli.benchmark_view import show_benchmark

    kinds = ["fpn", "pafpn", "image"]
    result = benchmark(
        **TINY | {"repeats": 1, "channels": None}, pyramid=kinds, levels="P4,P5", batch_size=2, images=str(photos)
    )
    names = ["mobilenet_v2", "mobilenet_v2 pafpn", "mobilenet_v2 image"]
    assert [case.name for case in result.cases] == [f"{name} float32 batch 2" for name in names]
    assert all(len(case.end_to_end) == 1 and min(case.forward) > 0 for case in result.cases)
    backbone, image = (result.cases[i].costs[0].flops for i in (0, 2))
    assert image == pytest.approx(5 * backbone, rel=0.01)  # C5 at one and at two times the size
    assert result.cases[2].forward_stages == ["C5"]
    show_benchmark(result)
    assert "mobilenet_v2  mobilenet_v2 pafpn  mobilenet_v2 image" in capsys.readouterr().out


def test_an_unreadable_image_is_left_out_and_named(result: BenchmarkResult) -> None:
    assert result.facts["images"].startswith("3 of ")
    assert [note.startswith("left out: bad.jpg: ") for note in result.facts["notes"]] == [True]


def test_the_plain_script_computes_the_same(result: BenchmarkResult) -> None:
    plain = result.cases[-1]
    assert plain.reason is None
    assert len(plain.forward) == 6
    assert len(plain.end_to_end) == 2
    assert plain.errors.keys() == {"P2", "C3", "P5", "P6"}
    assert max(plain.errors.values()) < 1e-4


@pytest.mark.slow
def test_openvino_computes_the_same(photos: Path) -> None:
    pytest.importorskip("openvino")
    result = benchmark(**TINY | {"repeats": 1}, images=str(photos), baseline="openvino")
    assert [case.name for case in result.cases][1:] == ["mobilenet_v2 openvino script batch 2"]
    assert max(result.cases[-1].errors.values()) < 1e-4
    assert result.cases[-1].forward
    assert result.cases[-1].end_to_end


@pytest.mark.slow
def test_each_backbone_has_its_own_plain_script(photos: Path) -> None:
    options = TINY | {"backbone": ["mobilenet_v2", "resnet50"], "repeats": 1}
    result = benchmark(**options, images=str(photos), baseline="plain")
    plain = [case for case in result.cases if case.baseline]
    assert [case.backbone for case in plain] == ["mobilenet_v2", "resnet50"]
    assert all(max(case.errors.values()) < 1e-4 for case in plain)


def test_the_error_of_a_precision_is_that_of_its_type(result: BenchmarkResult) -> None:
    assert not result.cases[0].errors
    errors = result.cases[2].errors
    assert errors.keys() == {"P2", "C3", "P5", "P6"}
    assert all(1e-4 < error < 0.5 for error in errors.values())  # bfloat16 keeps 8 bits


def test_json_has_every_sample_and_the_machine(result: BenchmarkResult) -> None:
    report = json.loads(json.dumps(result.to_json()))
    assert {"processor", "cpus", "torch_threads", "device", "versions", "memory_bytes"} <= report["machine"].keys()
    assert {"torch", "torchvision", "fpnx", "python", "h5py"} <= report["machine"]["versions"].keys()
    first = report["configurations"][0]
    assert first["stages"] == result.cases[0].stages
    assert first["forward"] == result.cases[0].forward
    assert first["end_to_end"] == result.cases[0].end_to_end
    assert first["summary"]["images_per_second"]["samples"] == 2
    assert first["ratios"]["forward"] == {"median": 1.0, "low": 1.0, "high": 1.0, "samples": 6}
    assert [shape["level"] for shape in first["shapes"]] == ["P2", "C3", "P5", "P6"]
    assert [cost["part"] for cost in first["costs"]] == ["backbone", "laterals", "outputs", "top block"]
    assert report["ceilings_flops"]["float32"] == result.ceilings["float32"]
    assert (report["rounds"], report["interrupted"], report["exit_code"]) == (2, False, 0)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_and_line_up(
    result: BenchmarkResult, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show_benchmark(result)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for label in (*READING, *NETWORK, *WRITING, "forward as one", "its stages, % of it", "peak RSS, MB", "error of P5"):
        assert any(line.startswith(label) for line in lines), label
    for unit in ("MB per image", "GFLOP", "images/s", "GFLOP/s", "MB/s", "ms  10th–90th"):
        assert unit in text
    assert "does not fit" in text
    assert "bottleneck of mobilenet_v2 float32 batch 2: " in text
    start = next(i for i, line in enumerate(lines) if line.startswith("time per image and stage"))
    table = lines[start + 1 : lines.index("", start)]
    stages = [line for line in table if line.startswith((*READING, *NETWORK, *WRITING, "forward as one"))]
    assert len({len(line) for line in stages}) == 1, "right edges differ"
    assert len({line.rindex("–") for line in stages}) == 1, "ranges do not line up"


def test_columns_that_do_not_fit_continue_in_another_table(
    result: BenchmarkResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    show_benchmark(result)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "throughput: median, 10th to 90th percentile (continued)" in lines
    assert sum(line.startswith("peak RSS, MB") for line in lines) > 1


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_chart(result: BenchmarkResult, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"stages.{ending}"
    draw_stages(result, str(path))
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[ending])
    if ending == "png":
        with Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert len(colours) > 12  # as many as stages, at least


def test_the_command_prints_one_json_document(fpnx: Callable[..., Any], photos: Path) -> None:
    options = ["--backbone", "mobilenet_v2", "--size", "64", "--channels", "8", "--repeats", "1", "--batch-size", "4"]
    code, out, err = fpnx("benchmark", *options, "--images", photos, "--json", "--plot", "stages.png")
    assert code == 0, err
    result = document(out)
    assert result["configurations"][0]["size"] == [64, 64]
    assert result["configurations"][0]["batch_size"] == 4
    assert Path("stages.png").stat().st_size > 10_000
    assert "measurements" in err


def test_an_interruption_keeps_what_was_measured(photos: Path) -> None:
    class InterruptingListener(Listener):
        def progress(self, what: str, done: int, total: int) -> None:
            if what == "measurements" and done == 2:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = benchmark(**TINY | {"repeats": 1000}, images=str(photos), listener=InterruptingListener())
    assert result.interrupted == signal.SIGINT
    assert result.exit_code == 130
    assert len(result.cases[0].forward) in (1, 2)
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted" in shown_on_a_terminal(result)


def test_an_interruption_before_the_first_sample_raises(photos: Path) -> None:
    class InterruptingListener(Listener):
        def progress(self, what: str, done: int, total: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="interrupted before") as caught:
        benchmark(**TINY, images=str(photos), listener=InterruptingListener())
    assert caught.value.signum == signal.SIGINT


def shown_on_a_terminal(result: BenchmarkResult) -> str:
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        show_benchmark(result)
    return out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "resnet5"], "did you mean resnet50?"),
        (["--batch-size", "0"], "batch size 0"),
        (["--batch-size", "1,1"], "batch size 1 is given twice"),
        (["--batch-size", "1,,8"], "batch size '1,,8': a value is empty"),
        (["--precision", "float32,half"], "precision 'half'"),
        (["--repeats", "0"], "repeats 0"),
        (["--images", "empty"], "no images in empty"),
        (["--images", "nowhere"], "nowhere"),
        (["--images", "unreadable"], "no image in unreadable can be read"),
        (["--plot", "stages.txt"], "plot stages.txt"),
        (["--plot", "nowhere/stages.png"], "its folder does not exist"),
        (["--baseline", "plain", "--size", "native", "--images", "one"], "takes one size"),
        (["--baseline", "onnx"], "baseline 'onnx': take plain or openvino"),
        (["--levels", "P2,P9"], "level 'P9'"),
        (["--pyramid", "fpn,pyramid"], "pyramid 'pyramid'"),
        (["--pyramid", "image", "--backbone", "mobilenet_v2", "--baseline", "plain"], "has an FPN, and not image"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests_are_one_line(fpnx: Callable[..., Any], arguments: list[str], message: str) -> None:
    for name in ("empty", "unreadable", "one"):
        Path(name).mkdir()
    Path("unreadable/a.jpg").write_bytes(b"no image")
    Image.new("RGB", (40, 40)).save("one/a.png")
    code, out, err = fpnx("benchmark", *arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.endswith("preparations")]
    assert len(lines) == 1, err
    assert lines[0].startswith("fpnx: ")
    assert message in lines[0]


def test_no_case_that_fits_is_an_error(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpnx.benchmark.case.available_memory", lambda: 1 << 20)
    with pytest.raises(FpnxError, match="nothing can be measured: mobilenet_v2 float32 batch 4 does not fit"):
        benchmark(**TINY, batch_size=4, images=str(photos), device="cpu")


def test_a_config_is_one_extraction_for_each_combination() -> None:
    config = BenchmarkConfig(backbone=["resnet50", "vgg16"], precision="float32,bfloat16", batch_size=[1, 8], size=64)
    runs = [(run.backbone, run.precision, run.batch_size) for run in config.runs()]
    assert runs == [(b, p, n) for b in ("resnet50", "vgg16") for p in ("float32", "bfloat16") for n in (1, 8)]
    assert BenchmarkConfig().runs() == [ExtractConfig(weights="random")]
    assert [run.backbone for run in BenchmarkConfig(backbone="resnet50,vgg16").runs()] == ["resnet50", "vgg16"]


def case_result(**samples: Any) -> CaseResult:
    """A configuration of 2 GFLOP and 4 MB for each image."""
    shape = LevelShape((64, 64), 1, "P2", 4, 1, 1000, 1000, 4_000_000)
    costs = (Cost("backbone", 10, 1_500_000_000), Cost("outputs", 10, 500_000_000))
    fixed = {"backbone": "vgg16", "pyramid": "fpn", "precision": "float32", "batch_size": 1, "size": (64, 64)}
    return CaseResult(**{**fixed, "shapes": [shape], "costs": costs, **samples})


STAGES = {
    "decode": [4.0],
    "resize + normalise": [2.0],
    "copy to device": [1.0],
    "C2": [12.0],
    "output P2": [6.0],
    "copy back": [1.0],
    "write": [2.0],
}


def test_statistics_follow_from_samples() -> None:
    result = case_result(stages=STAGES, forward=[20.0], end_to_end=[40.0])
    assert result.flops == 2_000_000_000
    assert result.bytes_per_image == 4_000_000
    assert result.achieved() == Percentiles(1e11, 1e11, 1e11, 1)  # 2 GFLOP in 20 ms
    assert result.accounted().median == pytest.approx(18 / 20)
    result.executed, result.core = 1_000_000_000, [25.0]  # levels recombined: half the operations
    assert result.achieved().median == 5e10
    assert result.flops == 2_000_000_000
    assert result.allowed(cpus=2).median == 80  # two cores, 25 ms an image
    busy = result.busy(workers=2, disk=200e6)
    # 40 images/s: 20 ms each in the network, 6 ms in two threads, 4 MB each onto a disk of 200 MB/s
    assert busy == {"network": pytest.approx(0.8), "decoding": pytest.approx(0.12), "writing": pytest.approx(0.8)}


@pytest.mark.parametrize(
    ("changed", "disk", "named"),
    [
        ({}, 2e9, "network, most of it in C2 (67 % of the forward pass); busy: network 80 %, decoding 12 %"),
        ({"decode": [40.0]}, 2e9, "decoding; busy: network 80 %, decoding 84 %"),
        ({}, 170e6, "writing; busy: network 80 %, decoding 12 %, writing 94 %"),
    ],
    ids=["network", "decoding", "disk"],
)
def test_the_bottleneck_is_named(changed: dict[str, list[float]], disk: float, named: str) -> None:
    case = case_result(stages=STAGES | changed, forward=[20.0], end_to_end=[40.0])
    result = BenchmarkResult(machine={}, facts={}, cases=[case], workers=2, disk=[disk])
    assert (result.bottleneck(case) or "").startswith(named)
    assert result.bottleneck(case_result(forward=[20.0])) is None


def test_ratios_pair_samples_of_the_same_round() -> None:
    first = case_result(forward=[10.0, 20.0, 40.0], end_to_end=[8.0, 4.0])
    # The machine slows down by four; the second is always twice as fast.
    second = case_result(forward=[5.0, 10.0, 20.0], end_to_end=[16.0, 8.0])
    missing = case_result(reason="does not fit")
    result = BenchmarkResult(machine={}, facts={}, cases=[missing, first, second])
    assert result.ratios(second) == {"forward": Percentiles(2, 2, 2, 3), "end to end": Percentiles(2, 2, 2, 2)}
    assert result.ratios(missing) == {}


def test_percentiles_by_hand() -> None:
    assert percentiles([float(n) for n in range(11, 0, -1)]) == Percentiles(6.0, 2.0, 10.0, 11)
    assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0, 1)


def test_peak_memory_includes_memory_that_was_freed() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system keeps one peak for a process's whole life")
    device = torch.device("cpu")
    with PeakMemory(device) as large:
        assert np.ones(25_000_000).sum() == 25_000_000  # 200 MB
    with PeakMemory(device) as small:
        pass
    assert 190e6 < large.added < 400e6
    assert small.added < 50e6
    assert large.rss >= large.added
    assert large.cuda is None


def test_executed_operations_are_fewer_where_the_fpn_is_fused() -> None:
    size = (64, 96)
    for backbone, fewer in (("resnet50", False), ("mobilenet_v2", True)):
        model = fpnx.create_model(backbone, weights="random", levels="P2-P5")
        defined = sum(cost.flops for cost in count_costs(model, size))
        assert count_executed(fuse_model(model, recombined=False), [size]) == defined
        assert (count_executed(fuse_model(model), [size]) < 0.8 * defined) is fewer


def test_hardware_limits_are_positive_and_leave_no_files(tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    product = MatrixProduct(torch.device("cpu"), "bfloat16")
    assert product.side >= 512
    assert math.isfinite(product.measure())
    assert product.measure() > 0
    assert torch.backends.cuda.matmul.allow_tf32 == before
    assert 0 < write_speed(tmp_path, (8 << 20) + 5) < 1e12
    assert not list(tmp_path.iterdir())


def test_synthetic_images_have_the_size_and_spectrum_of_photographs(tmp_path: Path) -> None:
    first, second = make_images(tmp_path, 2)
    assert first.read_bytes() != second.read_bytes()
    (tmp_path / "again").mkdir()
    assert make_images(tmp_path / "again", 1)[0].read_bytes() == first.read_bytes()
    with Image.open(first) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (1024, 768))
        grey = np.asarray(picture.convert("L")).astype(np.float64)
    assert 1e5 < first.stat().st_size < 5e5  # flat colour takes 12 kB, noise 1.1 MB
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    radius = np.hypot(np.fft.fftfreq(768)[:, None], np.fft.fftfreq(1024)[None])
    low, high = (power[(radius > r) & (radius < 1.2 * r)].mean() for r in (0.01, 0.1))
    assert 1.0 < math.log10(low / high) / 2 < 1.4  # amplitudes fall by this power of the frequency


def test_linked_images_repeat_in_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_text(name)
    link_images(tmp_path / "full", [tmp_path / "a.png", tmp_path / "b.png"], 3)
    link_images(tmp_path / "full", [tmp_path / "a.png", tmp_path / "b.png"], 5)
    assert "".join(path.read_text() for path in sorted((tmp_path / "full").iterdir())) == "ababa"
