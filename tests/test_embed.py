"""Features of a collection: each row belongs to its image, also after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import fastrm
from fastrm import embed
from fastrm.data.eval_view import eval_view
from fastrm.errors import UsageError
from fastrm.probes import embedding
from fastrm.probes.embedding import looked_up, projected
from fastrm.reports import maps
from tests.conftest import run_of_one_step

SIDE = 96
COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, and images in two classes, one of which has a line break in its name."""
    top = tmp_path_factory.mktemp("embed")
    run_of_one_step("test_resnet", SIDE, top / "run")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = top / "photos" / "ab"[number % 2] / (f"{number:02} \n.png" if number == 4 else f"{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return top


def given(folder: Path, out: Path, **more: Any) -> embed.EmbedConfig:
    """Options of fastrm.embed for the run and images of ``folder``."""
    return embed.EmbedConfig(run=folder / "run", data=str(folder / "photos"), out=out, workers=0, **more)


def one_by_one(folder: Path, *, patches: bool) -> list[np.ndarray]:
    """Features of each image by the network alone, in the order of the names: [D] or, as patches, [h, w, D]."""
    model, found = fastrm.load(folder / "run"), []
    for path in sorted((folder / "photos").rglob("*.png")):
        view = eval_view(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1), SIDE)[None]
        with torch.no_grad():
            found.append((model.forward_features(view)[0].permute(1, 2, 0) if patches else model(view)[0]).numpy())
    return found


@pytest.mark.parametrize("patches", [False, True])
def test_rows_equal_the_features_of_the_named_images(folder: Path, tmp_path: Path, patches: bool) -> None:
    found = embed.features(given(folder, tmp_path / "f.npy", patches=patches))
    np.testing.assert_allclose(found, np.stack(one_by_one(folder, patches=patches)), rtol=1e-4, atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    paths = sorted((folder / "photos").rglob("*.png"))
    assert [Path(row["name"]).name for row in rows] == [path.name for path in paths]
    assert [row["label"] for row in rows] == ["ab".index(path.parent.name) for path in paths]


def test_a_parquet_file_has_the_same_features(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    found = embed.features(given(folder, tmp_path / "f.parquet"))
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["name", "label", "features"]
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), dtype=np.float32), found)


def test_an_interrupted_run_continues_and_a_complete_one_is_not_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["fastrm.probes.features"], "BATCH", 4)
    monkeypatch.setattr(embedding, "_KEPT", 2)
    seen, whole = list[int](), embedding._seen

    def dying(*args: Any) -> Any:
        if len(args[1]) > 1:
            seen.append(len(args[1]))
            if sum(seen) > 12 and not (tmp_path / "again").exists():
                raise KeyboardInterrupt
        return whole(*args)

    options = given(folder, tmp_path / "f.npy", dtype="float16")
    with mock.patch.object(embedding, "_seen", dying):
        with pytest.raises(KeyboardInterrupt):
            embed.features(options)
        (tmp_path / "again").touch()
        assert not (tmp_path / "f.npy").exists()
        seen.clear()
        found = embed.features(options)
        assert sum(seen) == COUNT - 8  # two of three batches were already written
        seen.clear()
        embed.features(options)
        assert not seen
    assert "complete" in capsys.readouterr().out
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, np.stack(one_by_one(folder, patches=False)), rtol=2e-3, atol=2e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"f.npy", "f.json", "f.jsonl", "again"}


def test_an_unreadable_image_has_a_row_of_nan(folder: Path, tmp_path: Path) -> None:
    with (
        mock.patch("fastrm.embed.scan", lambda source, **_: (source, {})),
        mock.patch(
            "fastrm.data.eval_loader.eval_view", side_effect=[OSError("gone"), *[torch.zeros(3, SIDE, SIDE)] * COUNT]
        ),
        pytest.warns(UserWarning, match="left out"),
    ):
        found = embed.features(given(folder, tmp_path / "f.npy"))
    assert np.isnan(found).all(axis=1).tolist() == [True] + [False] * (COUNT - 1)
    assert "gone" in str(json.loads((tmp_path / "f.json").read_text())["not_read"])


def test_neighbours_and_the_map_are_drawn_without_labels(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (folder / "photos").rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    query = flat / "07.png"
    options = embed.EmbedConfig(
        run=folder / "run", data=str(flat), out=tmp_path / "f.npy", workers=0, queries=(query,), k=3,
        neighbours=tmp_path / "near.png", map=tmp_path / "map.png",
    )  # fmt: skip
    found = embed.features(options)
    names = [Path(json.loads(line)["name"]).name for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    at = names.index("07.png")
    cosines = (found / np.linalg.norm(found, axis=1, keepdims=True)) @ (found[at] / np.linalg.norm(found[at]))
    near = looked_up(found, torch.from_numpy(np.array(found[at : at + 1])), k=3)
    assert near.tolist() == [np.argsort(-cosines)[:3].tolist()]
    assert near[0, 0] == at
    assert Image.open(tmp_path / "near.png").width > 4 * 100
    assert Image.open(tmp_path / "map.png").width > 600


def test_the_points_of_a_map_are_principal_components(folder: Path, tmp_path: Path) -> None:
    found = np.array(embed.features(given(folder, tmp_path / "f.npy", map=tmp_path / "map.json"))).astype(np.float64)
    shown = maps.read(tmp_path / "map.json")
    centred = found - found.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    np.testing.assert_allclose(np.abs(shown.points), np.abs(points), atol=1e-3 * sizes[0])
    assert shown.axes[0] == f"first principal component, {100 * sizes[0] ** 2 / (sizes**2).sum():.0f} % of the variance"
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert shown.names == [row["name"] for row in rows]
    assert shown.labels is not None
    assert shown.labels.tolist() == [row["label"] for row in rows]
    assert shown.about == f"{COUNT} images of photos by the features of the student after 1 steps"


def test_a_map_leaves_out_unreadable_images_and_samples_large_sets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed.features(given(folder, tmp_path / "f.npy"))
    array = np.load(tmp_path / "f.npy")
    array[3] = np.nan
    np.save(tmp_path / "f.npy", array)
    names = [json.loads(line)["name"] for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    embed.features(given(folder, tmp_path / "f.npy", map=tmp_path / "map.json"))
    assert maps.read(tmp_path / "map.json").names == names[:3] + names[4:]
    monkeypatch.setattr(embed, "_DRAWN", 5)
    embed.features(given(folder, tmp_path / "f.npy", map=tmp_path / "map.json"))
    shown = maps.read(tmp_path / "map.json")
    assert [name for name in names if name in shown.names] == shown.names
    assert len(shown.names) == len(shown.points) == 5
    assert shown.about.startswith(f"5 of {COUNT} images")


def test_umap_separates_clusters_and_is_reproducible() -> None:
    pytest.importorskip("umap", reason="needs umap-learn")
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(8, dtype=np.float32)[:2], 20, axis=0) + 0.01 * rng.normal(size=(40, 8)).astype(np.float32)
    points, axes = projected(rows, "umap")
    assert axes[0].startswith("UMAP")
    clusters = points.reshape(2, 20, 2)
    middle = clusters.mean(axis=1)
    within = np.linalg.norm(clusters - middle[:, None], axis=2).max()
    assert within < np.linalg.norm(middle[0] - middle[1])
    np.testing.assert_array_equal(projected(rows, "umap")[0], points)


def test_a_missing_umap_is_reported_before_the_features_are_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UsageError, match=r"--projection umap needs the package umap-learn: .*; pip install umap-learn"):
        embed.features(given(folder, tmp_path / "f.npy", map=tmp_path / "map.json", projection="umap"))
    assert not list(tmp_path.iterdir())


NEAR = {"neighbours": "near.png"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"out": "f.txt"}, "must end in .npy or .parquet"),
        ({"out": "no/f.npy"}, "the folder no does not exist"),
        ({"out": "f.parquet", "patches": True}, "--patches is written to arrays only"),
        ({"queries": ("x.png",)}, "must be given together"),
        ({"map": "m.png", "patches": True}, "one row per image"),
        ({"map": "m.txt"}, "--map m.txt must end in .png, .jpg, .jpeg, or in .json for the report"),
        ({"map": "f.json"}, "--map f.json is the file that describes the features"),
        ({"map": "bare/mine.json"}, "--map bare/mine.json is there and not a map that fastrm wrote"),
        ({"projection": "umap"}, "--projection umap is for a map; give --map FILE too"),
        ({"part": "test", "data": "bare"}, "has one part"),
        ({"run": "https://host/f.safetensors"}, "https:/host/f.safetensors is a URL; download the file"),
        ({"image_size": 64}, "--image-size, --mean and --std are for weights of other programs, with --arch"),
        ({**NEAR, "queries": ("x.png",)}, "--queries .*x.png cannot be used: No such file"),
        ({**NEAR, "queries": ("bare",)}, "--queries .*bare cannot be used: it is not a regular file"),
        (
            {**NEAR, "queries": ("bare/one.png", "bare/mine.json")},
            "--queries .*mine.json cannot be used: cannot",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    Image.new("RGB", (9, 9)).save("bare/one.png")
    Path("bare/mine.json").write_text("{}")
    options = {"run": folder / "run", "data": str(folder / "photos"), "out": "f.npy", "workers": 0, **more}
    options |= {name: Path(options[name]) for name in ("run", "neighbours") if name in options}
    options["queries"] = tuple(map(Path, options.get("queries", ())))
    with pytest.raises(UsageError, match=said):
        embed.features(embed.EmbedConfig(**options))
    assert {path.name for path in tmp_path.iterdir()} == {"bare"}


def test_several_processes_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        embed.features(given(folder, tmp_path / "f.npy"))


def test_an_array_that_fastrm_did_not_write_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.zeros(3))
    before = (tmp_path / "f.npy").read_bytes()
    for name in ("f.npy", "f.parquet"):
        with pytest.raises(UsageError, match=r"f\.npy"):
            embed.features(given(folder, tmp_path / name))
    assert (tmp_path / "f.npy").read_bytes() == before
