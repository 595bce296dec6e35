"""LPIPS against torchmetrics' own model around a trunk that is written out here, with random weights in a file."""

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import lpips as reference

from autoprune.errors import UserError
from autoprune.measure.metrics import ImageBatch, MetricContext
from autoprune.measure.metrics.lpips import ALEXNET, VGG16, Lpips, LpipsVgg, Stage, Trunk, load_trunk, lpips

CPU = torch.device("cpu")


def alexnet() -> nn.Sequential:
    """torchvision's `alexnet().features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=False),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=False),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=False),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=False),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=False),
        nn.MaxPool2d(3, stride=2),
    )


def vgg16() -> nn.Sequential:
    """torchvision's `vgg16().features`, from its configuration D."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if entry == "M":
            layers.append(nn.MaxPool2d(2, stride=2))
        else:
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU(inplace=False)]
            channels = entry
    return nn.Sequential(*layers)


def published(features: nn.Module) -> dict[str, torch.Tensor]:
    """The layout of torchvision's files, with a classifier that is much too small."""
    return {f"features.{key}": value for key, value in features.state_dict().items()} | {"classifier.1.weight": torch.ones(2)}


@pytest.mark.parametrize(("metric", "make", "net"), [(Lpips, alexnet, "alex"), (LpipsVgg, vgg16, "vgg")])
def test_lpips_is_torchmetrics(monkeypatch, tmp_path, metric, make, net) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    features = make()
    torch.save(published(features), tmp_path / "trunk.pth")
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda name, pretrained: features)
    images, dense = torch.rand(2, 3, 3, 64, 80)
    theirs = reference.learned_perceptual_image_patch_similarity(images, dense, net, reduction="none", normalize=True)
    ours = metric(MetricContext(CPU, {metric.need.key: tmp_path / "trunk.pth"}))
    found = ours.measure(ImageBatch(images, [""] * 3, dense=dense))
    assert found == pytest.approx(theirs.tolist(), rel=1e-5) and (found > 0).all()
    assert ours.measure(ImageBatch(dense, [""] * 3, dense=dense)).tolist() == [0, 0, 0]


def test_a_distance_can_be_worked_out_by_hand() -> None:
    trunk = Trunk((Stage(0, ((2, 1, 1, 0),)),))
    with torch.no_grad():
        trunk.features[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]).view(2, 3, 1, 1))
        trunk.features[0].bias.zero_()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    seen = torch.tensor([[3.0, 4.0, 0], [5.0, 12.0, 0]])  # what the trunk sees: unit features (0.6, 0.8) and (5/13, 12/13)
    pictures = ((seen * scale + shift + 1) / 2).view(2, 3, 1, 1).expand(2, 3, 4, 4)
    heads = [torch.tensor([2.0, 10.0]).view(1, 2, 1, 1)]
    wanted = 2 * (0.6 - 5 / 13) ** 2 + 10 * (0.8 - 12 / 13) ** 2
    assert lpips(pictures[:1], pictures[1:], trunk, heads).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("stages", "make", "layers"), [(ALEXNET, alexnet, 13), (VGG16, vgg16, 31)])
def test_the_trunks_have_torchvisions_keys_and_shapes(stages, make, layers) -> None:  # noqa: ANN001
    with torch.device("meta"):
        ours, theirs = Trunk(stages).state_dict(), make()
    assert len(theirs) == layers
    assert {key: value.shape for key, value in ours.items()} == {
        f"features.{key}": value.shape for key, value in theirs.state_dict().items()
    }


def test_files_that_do_not_fit_are_refused(tmp_path) -> None:  # noqa: ANN001
    small = (Stage(0, ((4, 3, 1, 1),)),)
    state = published(nn.Sequential(nn.Conv2d(3, 4, 3)))
    for name, change in {
        "missing": {"features.0.bias": None},
        "unexpected": {"features.7.weight": torch.ones(1)},
        "shape": {"features.0.weight": torch.ones(5, 3, 3, 3)},
    }.items():
        file = tmp_path / f"{name}.pth"
        torch.save({key: value for key, value in (state | change).items() if value is not None}, file)
        with pytest.raises(UserError, match="features"):
            load_trunk(small, file, CPU)
    torch.save(nn.Conv2d(3, 4, 3), tmp_path / "module.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load_trunk(small, tmp_path / "module.pth", CPU)
    torch.save(state, tmp_path / "whole.pth")
    assert torch.equal(load_trunk(small, tmp_path / "whole.pth", CPU).features[0].weight, state["features.0.weight"])
