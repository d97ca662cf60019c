# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import run as run_bundle
from monai.data import MetaTensor
from torch import Tensor, nn

from common.engines import VolumeEmbedder
from common.engines.features import FeatureFolder, frozen_encoder, read_features
from common.engines.features.tiles import tile_origins, tile_shares
from common.errors import DataError, SettingsError, WeightsError
from common.files import write_record
from common.networks import Primus, ResEncUNet
from common.transforms import volume_preprocessing
from common.weights import write_checkpoint

from ..conftest import BUNDLES, NETWORK, ROOT, WHOLE_CHAIN, blobs, run, write_volume


class Averages(nn.Module):
    """A backbone whose maps are block means of the image at strides 1, 2 and 4: what its pooling gives is known."""

    feature_channels = [1, 1, 1]
    feature_strides = [1, 2, 4]

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[list[int]] = []

    def encode(self, image: Tensor, visible: Tensor | None = None, sparse: bool = False) -> list[Tensor]:
        self.sizes.append(list(image.shape[2:]))
        assert sparse == (visible is not None)
        return [F.avg_pool3d(image, stride) for stride in self.feature_strides]


class Ones(Averages):
    """A backbone that says 1 everywhere, also in padding."""

    def encode(self, image: Tensor, visible: Tensor | None = None, sparse: bool = False) -> list[Tensor]:
        return [torch.ones_like(found) for found in super().encode(image, visible, sparse)]


def small_unet(seed: int = 0, **kwargs: Any) -> ResEncUNet:
    torch.manual_seed(seed)
    return ResEncUNet(features_per_stage=[4, 8, 8], blocks_per_stage=[1, 1, 1], with_decoder=False, **kwargs)


def small_primus(seed: int = 0) -> Primus:
    torch.manual_seed(seed)
    return Primus(input_size=16, embed_dim=24, depth=2, num_heads=2, with_decoder=False)


@pytest.mark.parametrize("size", [(8, 8, 8), (9, 12, 17), (3, 30, 8), (1, 2, 40)])
@pytest.mark.parametrize("small_volumes", ["shrink", "hide"])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_every_voxel_counts_once(size: tuple[int, int, int], small_volumes: str, overlap: float) -> None:
    """Where tiles lie and how much pads them changes neither a constant nor, at stride 1, the moments of the image."""
    image = torch.rand(1, *size)
    options: dict[str, Any] = {"patch_size": [8, 8, 8], "small_volumes": small_volumes, "overlap": overlap}
    ones = VolumeEmbedder(Ones(), stages=[0, 1, 2], **options)(image)
    assert ones.vector == pytest.approx([1, 1, 1], abs=1e-5)
    found = VolumeEmbedder(Averages(), stages=[0], pooling="mean+std+max", **options)(image)
    expected = [float(image.mean()), float(image.std(correction=0)), float(image.max())]
    assert found.vector == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("size", "tile", "overlap"), [(64, 64, 0.5), (96, 64, 0.5), (256, 64, 0.25), (224, 160, 0.5)])
def test_tiles_cover_everything_and_overlap_as_asked(size: int, tile: int, overlap: float) -> None:
    stride = 32
    origins = tile_origins(size, tile=tile, stride=stride, overlap=overlap)
    assert origins[0] == 0
    assert origins[-1] == size - tile
    assert all(origin % stride == 0 for origin in origins)
    assert all(a < b <= a + max(stride, tile * (1 - overlap)) for a, b in itertools.pairwise(origins))
    shares, inside = tile_shares(origins, size=size - 5, tile=tile, stride=stride)
    total = np.zeros(size // stride)
    for origin, weights in zip(origins, shares * inside, strict=True):
        total[origin // stride :][: tile // stride] += weights
    assert total * stride == pytest.approx([stride] * (size // stride - 1) + [stride - 5])


def test_tiles_stay_as_small_as_the_volume_only_where_asked() -> None:
    image = torch.rand(1, 5, 9, 30)
    for small_volumes, sides in (("shrink", [8, 12, 16]), ("hide", [16, 16, 16])):
        network = Averages()
        VolumeEmbedder(network, patch_size=[16, 16, 16], small_volumes=small_volumes)(image)
        assert network.sizes == [sides] * 3


def test_tokens_of_padding_change_nothing_for_a_transformer() -> None:
    """A tile larger than the volume is computed from the volume's own tokens, at their own positions."""
    network = small_primus()
    image = torch.rand(1, 16, 8, 16)
    hidden = VolumeEmbedder(network, patch_size=[16, 16, 16], small_volumes="hide")(image).vector
    visible = torch.tensor([[[[True, True], [False, False]]] * 2])
    tokens = network.encode(F.pad(image, (0, 0, 0, 8))[None], visible=visible)[0]
    np.testing.assert_allclose(hidden, tokens[0, :, :, 0].mean((1, 2)).detach(), atol=1e-5)
    shrunk = VolumeEmbedder(network, patch_size=[16, 16, 16], small_volumes="shrink")(image).vector
    assert np.abs(hidden - shrunk).max() > 1e-4, "a smaller grid has other positions"


def test_hiding_and_shrinking_are_one_for_the_u_net() -> None:
    """Leaving blocks of padding out of convolutions and norms is the same as not having them."""
    image = torch.rand(1, 12, 16, 8)
    a, b = (
        VolumeEmbedder(small_unet(), patch_size=[16, 16, 16], small_volumes=how, stages=[0, 1, 2])(image).vector
        for how in ("shrink", "hide")
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("make", [small_unet, small_primus])
def test_one_tile_is_the_mean_of_the_map(make: Any) -> None:
    network = make()
    image = torch.rand(1, 16, 16, 16)
    found = VolumeEmbedder(network, patch_size=[16, 16, 16], dense=True)(image)
    expected = network.encode(image[None])[-1][0]
    np.testing.assert_allclose(found.vector, expected.mean((1, 2, 3)), atol=1e-5)
    assert found.dense is not None
    np.testing.assert_allclose(found.dense, expected, atol=1e-3, rtol=1e-3)
    assert found.dense.dtype == np.float16


def test_the_dense_map_agrees_with_the_embedding() -> None:
    found = VolumeEmbedder(small_unet(), patch_size=[8, 8, 8], dense=True)(torch.rand(1, 20, 12, 16))
    assert found.dense is not None
    assert found.dense.shape == (8, 5, 3, 4)
    np.testing.assert_allclose(found.dense.astype(float).mean((1, 2, 3)), found.vector, atol=2e-3)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "ASL"])
def test_the_dense_map_lies_on_the_image(axcodes: str, tmp_path: Path) -> None:
    """A bright ball in a file of any axes, spacing and origin: the brightest position lies on it within a stride."""
    centre = np.array([21.0, 9.0, 30.0])
    grid = np.stack(np.meshgrid(*map(np.arange, (36, 44, 40)), indexing="ij"), -1)
    values = np.random.default_rng(0).uniform(1, 2, grid.shape[:3]) + 50 * (np.linalg.norm(grid - centre, axis=-1) < 4)
    affine = np.array([[2.0, 0, 0, -70], [0, 1.5, 0, 12], [0, 0, 1.0, 5], [0, 0, 0, 1]])
    image = nib.Nifti1Image(values.astype(np.float32), affine)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    )
    nib.save(turned, tmp_path / "ball.nii.gz")
    loaded = volume_preprocessing(spacing_mm=1.0)({"image": str(tmp_path / "ball.nii.gz")})["image"]
    found = VolumeEmbedder(Averages(), patch_size=[16, 16, 16], dense=True)(loaded)
    assert found.dense is not None
    assert found.affine is not None
    peak = np.unravel_index(found.dense[0].argmax(), found.dense.shape[1:])
    where = found.affine @ [*peak, 1]
    assert np.abs(where - affine @ [*centre, 1])[:3].max() <= 4


@pytest.mark.parametrize("small_volumes", ["shrink", "hide"])
@pytest.mark.parametrize("size", [(8, 8, 8), (9, 12, 17), (3, 30, 8)])
def test_features_of_voxels_are_those_of_the_map_there(size: tuple[int, int, int], small_volumes: str) -> None:
    """At stride 1 the image itself, whatever tiles cover it; coarser maps of a ramp are the ramp but at its ends."""
    image = torch.rand(1, *size)
    points = np.stack(np.unravel_index(np.arange(image.numel()), size), 1)
    options: dict[str, Any] = {"patch_size": [8, 8, 8], "small_volumes": small_volumes}
    found = VolumeEmbedder(Averages(), stages=[0], **options).at(image, points)
    np.testing.assert_allclose(found[:, 0], image.flatten(), atol=1e-6)
    ones = VolumeEmbedder(Ones(), stages=[0, 1, 2], **options).at(image, points)
    np.testing.assert_allclose(ones, np.ones((len(points), 3)), atol=1e-6)
    ramp = torch.arange(24.0).view(1, 1, 1, 24).expand(1, 8, 8, 24)
    places = np.array([[3, 3, x] for x in range(24)])
    slopes = VolumeEmbedder(Averages(), patch_size=[8, 8, 24], stages=[0, 1, 2]).at(ramp, places)
    np.testing.assert_allclose(slopes[2:-2], np.arange(24.0)[2:-2, None].repeat(3, 1), atol=1e-5)
    assert slopes[0].tolist() == [0.0, 0.5, 1.5], "flat beyond the middle of the outermost position"


def test_stages_and_poolings_are_named_in_order() -> None:
    embedder = VolumeEmbedder(small_unet(), patch_size=[8, 8, 8], stages=[-1, 0], pooling="mean+max")
    found = embedder(torch.rand(1, 8, 8, 8))
    assert list(found.stages) == [0, 2]
    assert [len(values) for values in found.stages.values()] == [8, 16]
    assert len(embedder.columns) == len(found.vector) == 24
    assert embedder.columns[4] == {"stage": 0, "stride": 1, "pooling": "max", "channel": 0}
    assert embedder.columns[8]["stage"] == 2
    assert (found.stages[0][4:] >= found.stages[0][:4]).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"patch_size": [10, 8, 8]}, "multiples of 4"),
        ({"patch_size": [0, 8, 8]}, "multiples of 4"),
        ({"stages": [3]}, "stages 0 to 2"),
        ({"stages": []}, "stages 0 to 2"),
        ({"stages": "last"}, "stages 0 to 2"),
        ({"pooling": "median"}, "mean, std, max"),
        ({"pooling": "mean+mean"}, "mean, std, max"),
        ({"overlap": 1.0}, "less than 1"),
        ({"small_volumes": "pad"}, "shrink or hide"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        VolumeEmbedder(small_unet(), **{"patch_size": [8, 8, 8], **wrong})


def test_features_that_are_not_finite_are_refused() -> None:
    image = MetaTensor(torch.full((1, 8, 8, 8), float("nan")))
    with pytest.raises(DataError, match="--amp false"):
        VolumeEmbedder(small_unet(), patch_size=[8, 8, 8])(image)


# whole runs


def pretrained(bundle: str, path: Path, seed: int = 0) -> Path:
    network = small_unet(seed) if bundle.endswith("resenc_l") else small_primus(seed)
    write_checkpoint(dict(network.state_dict()), path)
    return path


def embed(bundle: str, data: Path, folder: Path, **settings: Any) -> list[str]:
    """Run the config in this process and return the names in the table."""
    narrow = {
        name.removeprefix("--"): json.loads(text) for name, text in zip(*[iter(NETWORK[bundle])] * 2, strict=True)
    }
    weights = folder.parent / f"{bundle}.pt"
    if not weights.exists():
        pretrained(bundle, weights)
    given = {"pretrained": str(weights), "patch_size": [16, 16, 16], "num_workers": 0, "device": "cpu"}
    run_bundle(
        config_file=str(ROOT / "bundles" / bundle / "configs" / "features.yaml"),
        bundle_root=str(ROOT / "bundles" / bundle),
        dataset_dir=str(data),
        output_dir=str(folder),
        **{**narrow, **given, **settings},
    )
    return read_features(folder)[0]


def refusal(kind: type[Exception], *arguments: Any, **settings: Any) -> str:
    """Return the sentence in which a run ends."""
    with pytest.raises(kind) as caught:
        embed(*arguments, **settings)
    return str(caught.value)


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_a_folder_of_volumes_becomes_a_table(bundle: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    names = embed(bundle, images, out, dense=True)
    assert names == [f"case_{index}" for index in range(4)]
    _, table = read_features(out)
    network = small_unet() if bundle.endswith("resenc_l") else small_primus()
    for name, row in zip(names, table, strict=True):
        with np.load(out / f"{name}.npz", allow_pickle=False) as content:
            assert content["embedding"].dtype == np.float32
            np.testing.assert_array_equal(content["embedding"], row, "the table holds every bit")
            about = json.loads(str(content["provenance"]))
            assert content["dense"].dtype == np.float16
            assert content["affine"].shape == (4, 4)
        assert about["source"] == [str(images / f"{name}.nii.gz")]
        assert about["settings"]["bundle"] == bundle
    volume = volume_preprocessing()({"image": str(images / "case_0.nii.gz")})["image"]
    how = "shrink" if bundle.endswith("resenc_l") else "hide"
    expected = VolumeEmbedder(network, patch_size=[16, 16, 16], small_volumes=how)(volume).vector
    np.testing.assert_allclose(table[0], expected, atol=1e-6)
    about = json.loads((out / "features.json").read_text())
    assert about["receipt"]["encoder_share"] == 1.0
    assert about["receipt"]["sha256"] == about["weights_sha256"]
    assert len(about["columns"]) == table.shape[1]
    assert any("55 against 76 Dice" in line for line in about["caveat"])
    assert not list(out.glob(".*")), "no half-written file"


def test_one_scan_in_two_orientations_or_with_more_empty_space_is_one_embedding(tmp_path: Path) -> None:
    values, _ = blobs(0)
    image = nib.Nifti1Image(values, np.diag([1.0, 1.0, 1.0, 1.0]))
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("LPS"))
    empty = np.pad(values, ((3, 9), (0, 5), (7, 0)))
    (tmp_path / "images").mkdir()
    nib.save(image, tmp_path / "images" / "ras.nii.gz")
    nib.save(turned, tmp_path / "images" / "lps.nii.gz")
    nib.save(nib.Nifti1Image(empty, np.eye(4)), tmp_path / "images" / "empty.nii.gz")
    embed("mae_resenc_l", tmp_path / "images", tmp_path / "f")
    _, table = read_features(tmp_path / "f")
    np.testing.assert_allclose(table[1], table[2], atol=1e-5)
    np.testing.assert_allclose(table[0], table[2], atol=1e-5)
    embed("mae_resenc_l", tmp_path / "images", tmp_path / "g", reorient=False)
    _, table = read_features(tmp_path / "g")
    assert np.abs(table[1] - table[2]).max() > 1e-3


def test_bad_cases_are_told_and_the_rest_is_done(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.nii.gz").write_bytes(b"no image")
    write_volume(images / "constant.nii.gz", np.ones((16, 16, 16), np.float32))
    image = np.asarray(nib.load(images / "case_3.nii.gz").dataobj).copy()
    image[: len(image) // 2] = 1e-31
    write_volume(images / "case_3.nii.gz", image)
    names = embed("mae_resenc_l", images, tmp_path / "f")
    assert names == [f"case_{index}" for index in range(4)]
    skipped = json.loads((tmp_path / "f" / "features.json").read_text())["skipped"]
    assert set(skipped) == {"broken", "constant"}
    assert "constant" in skipped["constant"]
    told = capsys.readouterr()
    assert "4 volume(s) embedded, 0 kept, 2 skipped" in told.out + told.err
    assert "note: of 1 of 6 images up to 50% of the voxels" in told.out
    assert "55 against 76 Dice" in told.out + told.err
    assert "broken.nii.gz" in refusal(DataError, "mae_resenc_l", images, tmp_path / "g", strict=True)
    only = tmp_path / "only"
    only.mkdir()
    (only / "broken.nii.gz").write_bytes(b"no image")
    assert "Nothing is left" in refusal(DataError, "mae_resenc_l", only, tmp_path / "h")


def test_a_killed_run_goes_on_and_other_weights_are_not_mixed_in(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f"
    whole = FeatureFolder.write
    written: list[str] = []

    def write(self: FeatureFolder, case: dict[str, Any], embedding: Any, *, images: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        whole(self, case, embedding, images=images)
        written.append(case["image"])

    monkeypatch.setattr(FeatureFolder, "write", write)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        embed("mae_resenc_l", images, out)
    monkeypatch.setattr(FeatureFolder, "write", whole)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert len(times) == 2
    (out / "case_3.npz").write_bytes(next(iter(times)).read_bytes()[:100])  # as a full disk might leave it
    assert len(embed("mae_resenc_l", images, out)) == 4
    assert "2 of 4 embeddings" in (told := capsys.readouterr()).out + told.err
    assert {path: path.stat().st_mtime_ns for path in times} == times
    before = (out / "features.csv").read_bytes()
    embed("mae_resenc_l", images, tmp_path / "g")
    assert (tmp_path / "g" / "features.csv").read_bytes() == before

    other = pretrained("mae_resenc_l", tmp_path / "other.pt", seed=1)
    told_other = refusal(SettingsError, "mae_resenc_l", images, out, pretrained=str(other))
    assert "other weights (sha256" in told_other
    assert "--overwrite true" in told_other
    assert "pooling mean, here max" in refusal(SettingsError, "mae_resenc_l", images, out, pooling="max")
    assert (out / "features.csv").read_bytes() == before
    embed("mae_resenc_l", images, out, pretrained=str(other), overwrite=True)
    assert (out / "features.csv").read_bytes() != before


def test_a_changed_file_is_embedded_anew_and_another_file_of_that_name_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    embed("mae_resenc_l", images, out)
    before = read_features(out)[1]
    write_volume(images / "case_1.nii.gz", blobs(9)[0])
    embed("mae_resenc_l", images, out)
    changed = np.abs(read_features(out)[1] - before).max(1) > 0
    assert changed.tolist() == [False, True, False, False]
    write_volume(tmp_path / "elsewhere" / "case_2.nii.gz", blobs(9)[0])
    assert "rename one" in refusal(DataError, "mae_resenc_l", tmp_path / "elsewhere", out)


def test_missing_or_foreign_weights_end_in_a_sentence(images: Path, tmp_path: Path) -> None:
    told = refusal(WeightsError, "mae_resenc_l", images, tmp_path / "f", pretrained="/nowhere.pt")
    assert "--from_scratch true" in told
    foreign = pretrained("mae_primus_m", tmp_path / "primus.pt")
    assert "of another network" in refusal(
        WeightsError, "mae_resenc_l", images, tmp_path / "f", pretrained=str(foreign)
    )
    assert not (tmp_path / "f" / "features.csv").exists()


def test_a_random_encoder_is_decided_by_its_seed(images: Path, tmp_path: Path) -> None:
    tables = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        embed("mae_primus_m", images, tmp_path / name, from_scratch=True, seed=seed, pretrained="/nowhere.pt")
        tables[name] = read_features(tmp_path / name)[1]
    np.testing.assert_array_equal(tables["a"], tables["b"])
    assert np.abs(tables["a"] - tables["c"]).max() > 1e-3
    assert "seed 0, here 1" in refusal(SettingsError, "mae_primus_m", images, tmp_path / "a", from_scratch=True, seed=1)


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_several_channels_go_through_the_adapted_first_layer(bundle: str, tmp_path: Path) -> None:
    """The same image in both channels gives what it gives alone: weights are repeated and divided."""
    for index in range(2):
        values, _ = blobs(index)
        write_volume(tmp_path / "one" / f"case_{index}.nii.gz", values)
        for channel in range(2):
            write_volume(tmp_path / "two" / f"case_{index}_{channel:04d}.nii.gz", values)
    embed(bundle, tmp_path / "one", tmp_path / "f")
    assert embed(bundle, tmp_path / "two", tmp_path / "g", channels=2) == ["case_0", "case_1"]
    np.testing.assert_allclose(read_features(tmp_path / "f")[1], read_features(tmp_path / "g")[1], atol=1e-4)


def test_all_parts_of_a_datalist_or_folder_are_embedded(images: Path, tmp_path: Path) -> None:
    lists = {"training": [{"image": "case_0.nii.gz"}], "validation": [{"image": "case_1.nii.gz"}]}
    lists["test"] = [{"image": "case_2.nii.gz"}, {"image": "case_0.nii.gz"}]
    (images / "list.json").write_text(json.dumps(lists))
    assert embed("mae_resenc_l", images, tmp_path / "f", datalist=str(images / "list.json")) == [
        f"case_{index}" for index in range(3)
    ]
    for folder, index in (("imagesTr", 0), ("imagesTs", 1)):
        write_volume(tmp_path / "nnunet" / folder / f"case_{index}_0000.nii.gz", blobs(index)[0])
    write_volume(tmp_path / "nnunet" / "labelsTr" / "case_0.nii.gz", blobs(0)[1])
    assert embed("mae_resenc_l", tmp_path / "nnunet", tmp_path / "g") == ["case_0", "case_1"]


def test_voxels_that_the_encoder_was_not_made_with_are_refused(tmp_path: Path) -> None:
    encoder = str(tmp_path / "e.pt")
    pretrained("mae_resenc_l", Path(encoder))
    for about in ({"settings": {"spacing_mm": [2, 2, 2]}}, {"spacing_mm": 2.0, "settings": {}}):
        write_record(about, tmp_path / "e.json")
        with pytest.raises(SettingsError, match=r"was made with spacing_mm .*2.*, and here it is 1.0; .* insist with"):
            frozen_encoder(small_unet(), pretrained=encoder, settings={"spacing_mm": 1.0, "reorient": True})
    write_record({"settings": {"reorient": False, "spacing_mm": None}}, tmp_path / "e.json")
    with pytest.raises(SettingsError, match="was made with reorient False"):
        frozen_encoder(small_unet(), pretrained=encoder, settings={"reorient": True})


def test_too_coarse_maps_are_told(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed("mae_resenc_l", images, tmp_path / "f", spacing_mm=3.0)
    told = capsys.readouterr()
    assert "choose finer --stages" in told.out + told.err


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_bundle_embeds(bundle: str, images: Path, tmp_path: Path) -> None:
    data = tmp_path / "few"
    data.mkdir()
    (images / "case_0.nii.gz").rename(data / "case_0.nii.gz")
    assert embed(bundle, data, tmp_path / "f", from_scratch=True) == ["case_0"]


def test_the_command_line(images: Path, tmp_path: Path) -> None:
    weights = pretrained("mae_resenc_l", tmp_path / "w.pt")
    arguments = ["--dataset_dir", images, "--output_dir", tmp_path / "f", "--pretrained", weights]
    result = run("mae_resenc_l", "features", *arguments, "--overwrite", "false", "--dense", "false")
    assert "encoder covered 100.0 %" in result.stdout
    assert "features: 4 volume(s) embedded, 0 kept, 0 skipped; 4 x 8 numbers" in result.stdout
    with open(tmp_path / "f" / "features.csv", newline="") as stream:
        assert next(csv.reader(stream))[:3] == ["case", "source", "f000"]
    with np.load(tmp_path / "f" / "case_0.npz", allow_pickle=False) as content:
        assert set(content) == {"embedding", "provenance"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column case"),
        ("case,source,f000\n", "needs the columns"),
        ("name,f000\na,1\n", "has no column case"),
        ("case,source,f000\na,a.nii,x\n", "texts or nothing among its numbers"),
        ("case,source,f000,f001\na,a.nii,1,2\nb,b.nii,1\n", "texts or nothing among its numbers"),
        ("case,source,f000\na,a.nii,nan\n", "NaN or infinite features of a"),
        ("case,source,f000\na,a.nii,1\na,b.nii,2\n", "several rows of a"),
    ],
)
def test_a_damaged_table_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_features(tmp_path)
