# ruff: noqa: SIM905  lists of names read better as text
"""The networks of the prunability benchmark: how each is built, and on what input it is run.

Weights are random: coupling does not depend on them. Inputs are the smallest square images that a network takes, so
that every cut can be checked in float64 on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = (64, 96, 128, 160, 192, 224, 256, 299)
TESTS = Path(__file__).resolve().parent.parent / "tests"

CLASSIFIERS = """
resnet18 vgg11_bn densenet121 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 efficientnet_b0
efficientnet_v2_s regnet_x_400mf regnet_y_400mf resnext50_32x4d wide_resnet50_2 mnasnet0_5 googlenet inception_v3
convnext_tiny swin_t alexnet vit_b_32 swin_v2_t maxvit_t
""".split()  # one of each architecture first; the others follow
SEGMENTATION = """
lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet50 deeplabv3_resnet50 fcn_resnet101 deeplabv3_resnet101
""".split()
DETECTION = """
ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn ssd300_vgg16 retinanet_resnet50_fpn
fcos_resnet50_fpn maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn fasterrcnn_resnet50_fpn
fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn_v2 maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn_v2
""".split()
# the smallest member (timm's own test networks aside) of every timm module that has one below 60 M parameters
TIMM = """
halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms cpubone_nano
crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mobilenetv2_035 efficientvim_m1 efficientvit_b0
efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050
hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256
poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilevit_xxs mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0
pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t resnetv2_18
rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_srelpos_small_patch16_224
vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
""".split()
# the smallest of every further line of names within those modules
TIMM_LINES = """
botnet26t_256 eca_botnext26ts_256 halo2botnet50ts_256 haloregnetz_b lambda_resnet26t lamhalobotnet50ts_256
sebotnet33ts_256 sehalonet33ts bat_resnext26ts eca_resnext26ts gcresnet33ts gcresnext26ts gernet_s regnetz_b16
repvgg_a0 resnet32ts resnext26ts seresnet33ts seresnext26ts convnextv2_atto cspdarknet53 cspresnet50 cspresnext50
darknet17 darknetaa53 sedarknet21 densenetblur121d efficientnet_lite0 efficientnetv2_rw_t fbnetc_100
gc_efficientnetv2_rw_t mixnet_s mnasnet_small mobilenet_edgetpu_100 semnasnet_050 spnasnet_100 tf_mixnet_s tinynet_e
eva02_tiny_patch14_224 ghostnetv3_050 hgnet_tiny hieradet_small coatnet_pico_rw_224 coatnext_nano_rw_224
maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 caformer_s18 convformer_s18 poolformer_s12 gmixer_12_224 mixer_s16_224
resmlp_12_224 fbnetv3_b lcnet_035 tf_mobilenetv3_small_075 mobilevitv2_050 eca_nfnet_l0 nfnet_l0 regnetv_040
regnety_002 regnetz_005 ecaresnet26t ecaresnetlight ecaresnext26t_32x4d resnetaa34d resnetblur18 resnetrs50
resnext50_32x4d seresnet18 seresnetaa50d seresnext26t_32x4d rexnetr_100 skresnext50_32x4d flexivit_small eca_vovnet39b
vovnet39a
""".split()
LAST = ("regnet_x_32gf", "regnet_y_32gf", "convnext_large", "vit_l_32", "vit_l_16", "vit_h_14", "regnet_y_128gf")


@dataclass(frozen=True)
class Case:
    """One network: `name` says where it comes from, as in torchvision:resnet18."""

    name: str
    kind: str  # a row of the summary


def cases() -> Iterator[Case]:
    """Every network, one of each architecture first, the largest last."""
    sys.path.insert(0, str(TESTS))
    from nets import NETS
    from torchvision import models

    yield from (Case(f"awkward:{name}", "awkward nets") for name in NETS)
    yield from (Case(f"torchvision:{name}", "torchvision classification") for name in CLASSIFIERS)
    yield from (Case(f"torchvision:{name}", "torchvision segmentation") for name in SEGMENTATION[:3])
    yield from (Case(f"torchvision:{name}", "torchvision detection") for name in DETECTION[:6])
    yield from (Case(f"timm:{name}", "timm, smallest of each family") for name in TIMM)
    yield from (Case(f"torchvision:{name}", "torchvision segmentation") for name in SEGMENTATION[3:])
    yield from (Case(f"torchvision:{name}", "torchvision detection") for name in DETECTION[6:])
    others = [name for name in models.list_models(module=models) if name not in CLASSIFIERS]
    yield from (Case(f"torchvision:{name}", "torchvision classification") for name in others if name not in LAST)
    yield from (Case(f"timm:{name}", "timm, further lines of names") for name in TIMM_LINES)
    yield from (Case(f"torchvision:{name}", "torchvision classification") for name in LAST)


def own_size(case: Case) -> int | None:
    """The side of the images that its published weights are judged at; None where there are none, as for awkward nets.

    Detectors resize to the side that a user chooses: here 320, as the smallest of them do.
    """
    origin, _, name = case.name.partition(":")
    if origin == "awkward":
        return None
    if origin == "timm":
        import timm

        return int(timm.get_pretrained_cfg(name, allow_unregistered=False).input_size[-1])
    if case.kind == "torchvision detection":
        return 320
    from torchvision import models

    judged = models.get_model_weights(name).DEFAULT.transforms()
    return int((judged.crop_size if hasattr(judged, "crop_size") else judged.resize_size)[0])


def build(case: Case, known: int | None = None) -> tuple[nn.Module, Any]:
    """The network in evaluation mode and one example input; `known` is the side of the image, if not the smallest."""
    sizes = SIZES if known is None else [known]
    torch.manual_seed(0)
    origin, _, name = case.name.partition(":")
    if origin == "awkward":
        from nets import NETS

        make, example = NETS[name]
        return make().eval(), example
    if origin == "timm":
        import timm

        model = timm.create_model(name).eval()
        size = model.default_cfg["input_size"][-1]
        return _on_smallest(model, [size] if model.default_cfg.get("fixed_input_size") else [*sizes, size])
    from torchvision import models

    if case.kind == "torchvision detection":
        whole = models.get_model(name, weights=None, weights_backbone=None).eval()
        return _on_smallest(RawDetector(whole), [128, 320] if known is None else sizes)
    extra = {"weights_backbone": None} if case.kind == "torchvision segmentation" else {}
    return _on_smallest(models.get_model(name, weights=None, **extra).eval(), sizes)


def _on_smallest(model: nn.Module, sizes: Any) -> tuple[nn.Module, Tensor]:
    """The network with a random image of the first size that its forward takes."""
    for size in sizes:
        image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.inference_mode():
                model(image)
        except Exception as error:  # a network refuses a size in its own way
            last = error
            continue
        return model, image
    raise last


class RawDetector(nn.Module):
    """A torchvision detector's backbone and heads, before post-processing.

    Non-maximum suppression and RoI align have no kernels in a CPU build of torch beside a CUDA build of torchvision,
    and post-processing has no channels. The box heads read adaptively pooled features, which keep channels as RoI
    align does.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.rpn_head = detector.rpn.head if hasattr(detector, "rpn") else None
        self.head = getattr(detector, "head", None)
        self.roi = _Roi(detector.roi_heads) if hasattr(detector, "roi_heads") else None

    def forward(self, image: Tensor) -> list[Any]:
        features = self.backbone(image)
        maps = list(features.values()) if isinstance(features, dict) else [features]
        found: list[Any] = []
        if self.rpn_head is not None:
            found.append(self.rpn_head(maps))
        if self.head is not None:
            found.append(self.head(maps))
        if self.roi is not None:
            found.append(self.roi(maps[0]))
        return found


class _Roi(nn.Module):
    """The box, mask and keypoint heads on one pooled region."""

    def __init__(self, heads: nn.Module) -> None:
        super().__init__()
        self.box = nn.Sequential(heads.box_head)
        self.box_predictor = heads.box_predictor
        self.mask = nn.Sequential(heads.mask_head, heads.mask_predictor) if heads.has_mask() else None
        self.keypoint = nn.Sequential(heads.keypoint_head, heads.keypoint_predictor) if heads.has_keypoint() else None

    def forward(self, features: Tensor) -> list[Any]:
        found: list[Any] = [self.box_predictor(self.box(F.adaptive_avg_pool2d(features, 7)))]
        region = F.adaptive_avg_pool2d(features, 14)
        found += [head(region) for head in (self.mask, self.keypoint) if head is not None]
        return found
