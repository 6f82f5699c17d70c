"""Facts of backbones by their names: against figures that others published, arithmetic, and the networks themselves."""

import subprocess
import sys

import pytest
import timm
import torchvision

from featcache.backbones import catalog
from featcache.backbones.catalog import (
    ALIASES,
    CHOSEN,
    count_live,
    counted,
    facts_of,
    facts_of_all,
    is_commercial,
    matching,
)
from featcache.backbones.load import backbone_names, load_backbone
from featcache.errors import BackboneError


def skip_unless_known(name: str) -> None:
    """Some came to timm later than the oldest version that featcache takes."""
    if name.startswith("timm/") and not timm.is_model(name.removeprefix("timm/").split(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {name}")


SMALL = "timm/vit_small_patch14_reg4_dinov2.lvd142m"


@pytest.mark.parametrize(
    ("name", "gmacs", "millions", "left_out"),
    [
        # torchvision's and timm's documentation; their parameters count the final layer, too.
        ("resnet50", 4.1, 25.6, 2049 * 1000),
        ("mobilenet_v2", 0.3, 3.5, 1281 * 1000),
        ("vit_b_16", 17.6, 86.6, 769 * 1000),
        ("convnext_tiny", 4.5, 28.6, 769 * 1000),
        ("timm/tf_efficientnet_lite0.in1k", 0.4, 4.65, 1281 * 1000),
        ("timm/vit_base_patch16_dinov3_qkvb.lvd1689m", 23.6, 85.7, 0),
        ("timm/vit_pe_core_tiny_patch16_384.fb", 4.7, 6.1, 192 * 512),
        ("timm/vit_pe_core_small_patch16_384.fb", 15.7, 23.8, 384 * 512),
        ("timm/vit_so400m_patch14_siglip_224.v2_webli", 110, 427.7, 0),
    ],
)
def test_figures_that_others_published(name: str, gmacs: float, millions: float, left_out: int) -> None:
    skip_unless_known(name)
    facts = facts_of(name)
    assert facts.gmacs == pytest.approx(gmacs, abs=0.051 if gmacs < 100 else 0.5)
    assert (facts.parameters + left_out) / 1e6 == pytest.approx(millions, abs=0.051)


def test_torchvision_counts_the_same() -> None:
    """Oracle: what torchvision notes beside its weights, counted by its own scripts, with the final layer."""
    for name in torchvision.models.list_models(module=torchvision.models):
        weights = {member.name: member for member in torchvision.models.get_model_weights(name)}
        meta = weights.get("IMAGENET1K_V1", weights.get("IMAGENET1K_SWAG_LINEAR_V1", [*weights.values()][-1])).meta
        facts = facts_of(name)
        final = meta["num_params"] - facts.parameters
        if name == "inception_v3":  # its second classifier is counted there, but not run
            final = (facts.dim + 1) * 1000
        assert final in (0, (facts.dim + 1) * 1000, facts.dim * 1000), name
        places = 13**2 if name.startswith("squeezenet") else 1  # it classifies each place of its map
        assert facts.gmacs == pytest.approx(meta["_ops"] - places * final / 1e9, rel=0.002, abs=0.002), name


def test_a_transformer_by_arithmetic() -> None:
    """Patches of 14 pixels, a class and four register tokens; per block and token 12 D^2 for matrices, 2 T D for attention."""
    dim, tokens, blocks = 384, (224 // 14) ** 2 + 5, 12
    patches = 256 * 3 * 14**2 * dim
    assert facts_of(SMALL).gmacs * 1e9 == pytest.approx(
        patches + blocks * tokens * dim * (12 * dim + 2 * tokens), rel=1e-3
    )


def test_another_size() -> None:
    """timm's own table: 46.9 GMACs at the 518 pixels that the weights were last trained at."""
    facts = facts_of(SMALL, size=(518, 518))
    assert (facts.input, facts.dim) == ((518, 518), 384)
    assert facts.gmacs == pytest.approx(46.9, rel=0.01)
    assert facts.parameters - facts_of(SMALL).parameters == (37**2 - 16**2) * 384  # position embeddings


SAMPLE = ["resnet18", "timm/tf_efficientnet_lite0.in1k", SMALL]
MORE = [
    *("swin_t", "regnet_y_400mf", "inception_v3", "squeezenet1_1", "maxvit_t", "vit_l_32"),
    *("timm/convnext_atto.d2_in1k", "timm/vit_base_patch16_224.mae", "timm/crossvit_9_240.in1k"),
    *(
        "timm/swinv2_tiny_window8_256.ms_in1k",
        "timm/mobilenetv3_small_050.lamb_in1k",
        "timm/beit_base_patch16_384.in22k_ft_in22k_in1k",
    ),
    *("timm/vit_base_patch16_siglip_224.v2_webli", "timm/eva02_tiny_patch14_224.mim_in22k"),
]


@pytest.mark.parametrize("name", SAMPLE + [pytest.param(name, marks=pytest.mark.slow) for name in MORE])
def test_the_file_says_what_the_installed_library_builds(name: str) -> None:
    skip_unless_known(name)
    assert counted()[name] == count_live(name)


def test_a_network_with_values_counts_the_same() -> None:
    backbone = load_backbone("squeezenet1_1", "none")
    facts = facts_of("squeezenet1_1")
    assert catalog.count_macs(backbone) == counted()["squeezenet1_1"].macs
    assert (facts.dim, facts.input) == (backbone.dim, backbone.preprocess.crop)


def test_names_that_stand_for_one_network() -> None:
    assert [*ALIASES] == ["fast", "base", "best"]
    for alias, name in ALIASES.items():
        assert facts_of(alias) == facts_of(name)
        assert facts_of(alias).commercial
        assert not facts_of(alias).gated
    assert facts_of("base").linear_probe == 80.9
    assert "DINOv2" in str(facts_of("base").source)
    assert {*CHOSEN, *catalog._PUBLISHED} <= counted().keys()


@pytest.mark.parametrize(
    ("name", "licence", "commercial", "gated", "pretrained"),
    [
        ("resnet50", "bsd-3-clause", True, False, True),
        ("vit_h_14", "cc-by-nc-4.0", False, False, True),  # SWAG
        ("timm/vit_base_patch16_dinov3.lvd1689m", "dinov3-license", True, True, True),
        ("timm/fastvit_mci0.apple_mclip", "apple-amlr", False, False, True),
        ("timm/coatnet_0_224", None, None, False, False),
    ],
)
def test_licences(name: str, licence: str, commercial: bool, gated: bool, pretrained: bool) -> None:
    skip_unless_known(name)
    facts = facts_of(name)
    found = (facts.licence, facts.commercial, facts.gated, facts.pretrained)
    assert found == (licence, commercial, gated, pretrained)


@pytest.mark.parametrize(
    ("licence", "commercial"),
    [
        *((name, True) for name in ("apache-2.0", "MIT", "bsd-3-clause")),
        *(
            (name, False)
            for name in ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "fair-noncommercial-research-license", "seer-license")
        ),
        *((name, None) for name in (None, "", "unknown", "other", "gemma", "qwen-community-1.0")),
    ],
)
def test_what_a_licence_allows(licence: str | None, commercial: bool | None) -> None:
    assert is_commercial(licence) is commercial


def test_what_cannot_be_known() -> None:
    with pytest.raises(BackboneError, match="near: resnet50"):
        facts_of("resnet51")
    with pytest.raises(BackboneError, match="nosuch"):
        facts_of("timm/resnet50.nosuch")
    unusable = next(line.name for line in counted().values() if not line.dim)
    with pytest.raises(BackboneError):
        facts_of(unusable)
    assert facts_of_all([unusable]) == {unusable: None}
    assert facts_of_all(["resnet51", "resnet50"]) == {"resnet51": None, "resnet50": facts_of("resnet50")}


def test_all_names_are_there_without_pytorch() -> None:
    assert matching() == backbone_names()
    assert matching("SQUEEZE") == backbone_names("squeeze")
    assert "timm/resnet50.a1_in1k" in matching("resnet50.a1")  # only weights are called so
    if not all(map(catalog.is_current, ("timm", "torchvision"))):
        pytest.skip("catalog.csv was counted with other versions")
    code = (
        "import sys; from featcache.backbones.catalog import *; facts_of_all(matching()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_another_version_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines count while name, licence and input are still the library's; else the network is counted."""
    right = {name: facts_of(name) for name in ("resnet18", "squeezenet1_1", "timm/resnet18")}
    monkeypatch.setattr(catalog, "is_current", lambda _: False)
    old = dict(counted())
    old["squeezenet1_1"] = catalog.Counted("squeezenet1_1", 9, 9, 9, 9, 9, "bsd-3-clause")  # another input
    old["timm/resnet18"] = catalog.Counted(
        "timm/resnet18.other", 224, 224, 9, 9, 9, "apache-2.0"
    )  # other default weights
    old["resnet18"] = catalog.Counted("resnet18", 224, 224, 9, 9, 9, "bsd-3-clause")
    monkeypatch.setattr(catalog, "counted", lambda: old)
    assert facts_of("squeezenet1_1") == right["squeezenet1_1"]
    assert facts_of("timm/resnet18") == right["timm/resnet18"]
    assert facts_of("resnet18").dim == 9
    assert matching() == backbone_names()
