"""Backbone and head as one trainable network, and back again.

In: a ``Backbone`` and a cached ``Head``. Out: a ``Network`` whose logits are those of the cached head, its stages, what of
it trains, and, after training, a ``Head`` again. Everything here works on any architecture that ``backbones/load.py`` loads.
"""

import copy
import dataclasses
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from featcache.backbones.backbone import Backbone, hash_tensors
from featcache.backbones.encoder import channels_last
from featcache.errors import ModelError
from featcache.finetuning.draws import DropPath
from featcache.finetuning.onednn import without_faults
from featcache.finetuning.recipes import Recipe
from featcache.heads.head import Array, Head, scale_features
from featcache.heads.layers import linear_layers, unit_length
from featcache.images.preprocess import channel_constants, normalise

_FEWEST_STAGES, _LARGEST_STAGE, _SMALLEST_END = 4, 0.8, 0.05
# Of the backbone's parameters, at most, in what is left as it is: 2 % are a ResNet's before layer2, MobileNetV2's before features.6.
_LEFT = {"most": 0.02, "half": 0.5}
_LENGTH = 32.0  # of embeddings as the head sees them, root mean square: that of 1,024 values of size 1
Net = TypeVar("Net", bound=nn.Module)
_BatchNorm = nn.modules.batchnorm._BatchNorm
_REMEMBERED = "attention_bias_cache"  # timm's, of LeViT, TinyViT, EfficientFormer and others: kept from call to call in prediction
_WITH_WEIGHTS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class EmbeddingScale(nn.Module):
    """Scales embeddings to one length, so that one learning rate of the head fits any backbone.

    Attributes:
        unit: whether to divide each row by its norm, the one scaling that does not fold into a linear layer.
        factor: one constant; it is folded into the weights again when the head is stored.
    """

    factor: torch.Tensor

    def __init__(self, *, unit: bool, factor: float) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("factor", torch.tensor(factor))  # part of the state: a resumed run takes the same

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102 - (N, D) -> (N, D)
        x = x.float()  # half precision has no room for the factor of very small embeddings
        return (unit_length(x) if self.unit else x) * self.factor


class Network(nn.Module):
    """Pixels in, logits out.

    Attributes:
        backbone: (N, 3, H, W) -> (N, D). head: (N, D) -> (N, C). mean, std: (1, 3, 1, 1), of the normalisation.
        size: (H, W) of the pixels.
        used: name of each parameter of the backbone that embeddings depend on -> its place in the order of their first use. The others,
            as those of a pooler that ``--pool`` passes by, never train.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone, head: nn.Sequential) -> None:
        super().__init__()
        module: nn.Module = copy.deepcopy(backbone.module)._apply(channels_last)  # type: ignore[no-untyped-call]
        self.backbone = without_faults(module)
        self.head, self.size = head, backbone.preprocess.crop
        mean, std = channel_constants(backbone.preprocess, torch.device("cpu"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.used = _first_uses(self.backbone, self.size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> logits (N, C), on the device that pixels and network are on."""
        logits: torch.Tensor = self.head(self.backbone(normalise(pixels, self.mean, self.std)))
        return logits


def assemble(backbone: Backbone, head: Head, features: Array) -> Network:
    """The network that computes what ``head`` computes on the backbone's embeddings.

    Args:
        features: (n, D) embeddings of some images: how large they are decides how far a step of the
            optimizer moves the logits, and so the factor that ``EmbeddingScale`` takes.
    """
    scale = EmbeddingScale(unit=head.scaling == "unit", factor=_factor(head, features))
    return Network(backbone, nn.Sequential(scale, *linear_layers(head, factor=float(scale.factor))))


def _factor(head: Head, features: Array) -> float:
    """What brings the rows that the first layer sees to one length, whatever their scaling, size and number of values.

    Adam moves every weight by about its learning rate, so that a logit moves by that times the sum of |x|, which is at most
    sqrt(D) times the length of x. Values that are always zero take no part in either.
    """
    x = features.astype(np.float64)
    if head.scaling == "unit":
        x = scale_features(x, "unit", head.mean, head.scale)
    length = float(np.sqrt((x**2).sum(axis=1).mean()))
    return _LENGTH / length if length > 0 else 1.0


def with_new_head(backbone: Backbone, recipe: Recipe, n_classes: int, *, seed: int) -> Network:
    """The network with a random head of the recipe's shape."""
    sizes = [backbone.dim, *(recipe.hidden or ())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for number, (before, after) in enumerate(zip(sizes, [*sizes[1:], n_classes], strict=True)):
            if number:
                modules += [nn.ReLU(), nn.Dropout(recipe.dropout[number - 1] if recipe.dropout else 0.0)]
            modules.append(nn.Linear(before, after))
    return Network(backbone, nn.Sequential(*modules))


def to_head(network: Network) -> Head:
    """The network's head as stored in a model; the inverse of ``assemble``, with the scaling folded in."""
    linear = [module for module in network.head if isinstance(module, nn.Linear)]
    layers = tuple((m.weight.detach().cpu().numpy().copy(), m.bias.detach().cpu().numpy().copy()) for m in linear)
    first, dim = network.head[0], linear[0].in_features
    scaling = "none"
    if isinstance(first, EmbeddingScale):
        scaling = "unit" if first.unit else "none"
        layers = ((layers[0][0] * np.float32(float(first.factor)), layers[0][1]), *layers[1:])
    zeros, ones = np.zeros(dim, np.float32), np.ones(dim, np.float32)
    return Head("mlp" if len(layers) > 1 else "linear", scaling, zeros, ones, layers)  # type: ignore[arg-type]


def to_backbone(network: Network, backbone: Backbone, source: str) -> Backbone:
    """``backbone`` with the network's weights, to be saved; ``source`` says where they came from, in words."""
    module = copy.deepcopy(network.backbone).cpu().to(memory_format=torch.contiguous_format)
    module.eval().requires_grad_(False)
    digest = hash_tensors(module.state_dict())
    return dataclasses.replace(
        backbone, module=module, weights=source, weights_sha256=digest, reload=None, published={}
    )


def check_parity(network_logits: Array, head_logits: Array, *, tolerance: float) -> float:
    """Compare the assembled network with the cached head on the same images.

    Args:
        network_logits, head_logits: (n, C).
        tolerance: largest accepted difference, relative to the spread of the head's logits.

    Returns:
        ``difference_of`` them.

    Raises:
        ModelError: larger than ``tolerance``: what would train is not what was cached.
    """
    difference = difference_of(network_logits, head_logits)
    if not difference <= tolerance:
        same = float((network_logits.argmax(axis=1) == head_logits.argmax(axis=1)).mean())
        raise ModelError(
            f"the assembled network does not compute what the cached head computes: on {len(head_logits)} images the logits differ by "
            f"{difference:.2%} of their spread, expected at most {tolerance:.2%} ({same:.0%} of the labels agree); the images, the "
            "weights or the preprocessing are not those of the cache: extract and fit the head again"
        )
    return difference


def difference_of(found: Array, expected: Array) -> float:
    """|found - expected| / |expected - mean over classes| of logits (n, C), in the Frobenius norm."""
    a, b = (logits.astype(np.float64) for logits in (found, expected))
    a, b = (logits - logits.mean(axis=1, keepdims=True) for logits in (a, b))  # what softmax sees
    return float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-12)


def take_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Set all tensors of ``module``'s state. Raises RuntimeError: other names or shapes."""
    state = OrderedDict(weights)
    # Versions of its parts, without which MNASNet takes nothing.
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state)


def interpolate(start: Net, tuned: Net, *, alpha: float) -> Net:
    """(1 - alpha) start + alpha tuned, exactly ``start`` at 0 and ``tuned`` at 1; counters between are those of ``tuned``.

    Weight-space interpolation of WiSE-FT (Wortsman et al. 2022), on the CPU.
    """
    mixed = copy.deepcopy(tuned if alpha else start)
    if 0 < alpha < 1:
        weights = start.state_dict()
        for name, tensor in tuned.state_dict().items():
            weights[name] = weights[name].cpu().lerp(tensor.cpu(), alpha) if tensor.is_floating_point() else tensor
        mixed.load_state_dict(weights)
    return mixed


# ------------------------------------------------------------------------------------------- what of it trains


def stages(module: nn.Module, used: Mapping[str, int] | None = None) -> list[list[nn.Parameter]]:
    """The backbone's parameters from input to output, in stages, found without knowing the architecture.

    ``used``: as ``Network.used``; else parts are in the order of their registration, in which OpenCLIP's last projection comes first.

    A transformer, and what is built like one (Swin, ConvNeXt): what comes before the first block, then each block, as the
    layer-wise rates of BEiT have it (Bao et al. 2022). What lies between two blocks belongs to the later one, as timm has it.

    Others: the largest part is divided into its children until there are at least four parts and none that can be divided
    holds more than four fifths of the parameters. That gives ResNet's layers, MobileNet's blocks. What has no matrix or
    kernel joins its neighbour.

    What follows the last block joins it where it is small, as a norm is.
    """
    place = {id(module.get_parameter(name)): number for name, number in (used or {}).items()}
    if kinds := _block_kinds(module):
        return _by_block(_in_order(_around_blocks(module, kinds), place), kinds, total=_size(module))
    parts = [_parameters(part) for part in _in_order(_divide(module), place)]
    return _join_small_end(_merge_small(parts), total=_size(module))


def _in_order(parts: Iterable[nn.Module | nn.Parameter], place: Mapping[int, int]) -> list[nn.Module | nn.Parameter]:
    """Parts by the first use of any of their parameters, whose ``place`` by id is given; others behind what they stood behind."""
    ranked, rank = list[tuple[int, nn.Module | nn.Parameter]](), -1
    for part in parts:
        rank = min((place[id(p)] for p in _parameters(part) if id(p) in place), default=rank)
        ranked.append((rank, part))
    return [part for _, part in sorted(ranked, key=lambda entry: entry[0])]


def _block_kinds(module: nn.Module) -> set[type[nn.Module]]:
    """Classes of blocks: several in one list, each with several layers; none, if no block has another norm than batch norms.

    Of lists within lists the innermost counts: stages hold blocks.
    """
    counts = Counter(
        (number, type(child))
        for number, part in enumerate(module.modules())
        if isinstance(part, nn.Sequential | nn.ModuleList)
        for child in part
        if not isinstance(child, nn.Sequential | nn.ModuleList)
        and sum(isinstance(layer, _WITH_WEIGHTS) for layer in child.modules()) > 1
    )
    repeated = {kind for (_, kind), count in counts.items() if count > 1}
    blocks = [part for part in module.modules() if type(part) in repeated]
    outer = {type(block) for block in blocks if any(type(m) in repeated for m in block.modules() if m is not block)}
    return repeated - outer if any(_has_norm(block) for block in blocks if type(block) not in outer) else set()


def _has_norm(block: nn.Module) -> bool:
    """Whether one of its modules scales each channel, and is no batch norm."""
    weights = (getattr(m, "weight", None) for m in block.modules() if not isinstance(m, _BatchNorm))
    return any(isinstance(weight, nn.Parameter) and weight.ndim == 1 for weight in weights)


def _by_block(
    parts: list[nn.Module | nn.Parameter], kinds: set[type[nn.Module]], *, total: int
) -> list[list[nn.Parameter]]:
    """What comes before the first block, each block with what lies before it, what follows the last."""
    blocks = [k for k, part in enumerate(parts) if type(part) in kinds]
    cuts = itertools.pairwise([0, blocks[0], *(k + 1 for k in blocks)])
    found = [[parameter for part in parts[a:b] for parameter in _parameters(part)] for a, b in cuts if b > a]
    end = _merge_small([found[-1], *map(_parameters, parts[blocks[-1] + 1 :])])
    return found[:-1] + _join_small_end(end, total=total)


def _around_blocks(module: nn.Module, kinds: set[type[nn.Module]]) -> Iterator[nn.Module | nn.Parameter]:
    """Blocks, and the largest parts that hold none, in their order."""
    for part in _children(module):
        holds = (
            isinstance(part, nn.Module) and type(part) not in kinds and any(type(m) in kinds for m in part.modules())
        )
        yield from _around_blocks(part, kinds) if holds else [part]  # type: ignore[arg-type] # a parameter holds nothing


def _divide(module: nn.Module) -> list[nn.Module | nn.Parameter]:
    """The largest part divided until there are enough, none of which holds most of the parameters."""
    parts: list[nn.Module | nn.Parameter] = [module]
    while dividable := [part for part in parts if isinstance(part, nn.Module) and any(part.children())]:
        largest = max(dividable, key=_size)
        if len(parts) >= _FEWEST_STAGES and _size(largest) <= _LARGEST_STAGE * _size(module):
            break
        place = next(k for k, part in enumerate(parts) if part is largest)
        parts[place : place + 1] = _children(largest)
    return parts


def _children(part: nn.Module) -> list[nn.Module | nn.Parameter]:
    """Direct parameters, then child modules that hold any."""
    return [*part.parameters(recurse=False), *(child for child in part.children() if _size(child))]


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _size(part: nn.Module | nn.Parameter) -> int:
    return sum(parameter.numel() for parameter in _parameters(part))


def _merge_small(parts: list[list[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Join parts without a matrix or kernel to the one before them; the first ones to the one after them."""
    merged: list[list[nn.Parameter]] = []
    pending: list[nn.Parameter] = []
    for part in parts:
        if any(parameter.ndim > 1 and max(parameter.shape[:2]) > 1 for parameter in part):
            merged.append(pending + part)
            pending = []
        elif merged:
            merged[-1] += part
        else:
            pending += part
    return merged or [pending]


def _join_small_end(parts: list[list[nn.Parameter]], *, total: int) -> list[list[nn.Parameter]]:
    """Join a last part of few of the ``total`` parameters to the one before it, and again."""
    while len(parts) > 1 and sum(map(_size, parts[-1])) < _SMALLEST_END * total:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def _first_uses(backbone: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """``Network.used`` for pixels of (H, W)."""
    names = {parameter: name for name, parameter in backbone.requires_grad_(True).named_parameters()}
    with torch.enable_grad():
        embedding = backbone(torch.zeros(1, 3, *size))
    # Nodes of autograd's graph, whose leaves hold parameters; the others are numbered as they were called.
    nodes, seen, first = [embedding.grad_fn], {None}, dict[str, int]()
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            for before, _ in node.next_functions:
                if isinstance(parameter := getattr(before, "variable", None), nn.Parameter) and parameter in names:
                    number, name = node._sequence_nr(), names[parameter]
                    first[name] = min(number, first.get(name, number))
            nodes += [before for before, _ in node.next_functions]
    backbone.requires_grad_(False)
    return {name: place for place, name in enumerate(sorted(first, key=first.__getitem__))}


def _trainable_stages(network: Network) -> list[list[nn.Parameter]]:
    """``stages`` of the backbone, of what embeddings depend on."""
    used = {id(network.backbone.get_parameter(name)) for name in network.used}
    found = stages(network.backbone, network.used)
    kept = ([parameter for parameter in stage if id(parameter) in used] for stage in found)
    return [stage for stage in kept if stage]


def _stages_to_train(network: Network, recipe: Recipe) -> list[list[nn.Parameter]]:
    """Those of ``_trainable_stages`` that train in any epoch of the recipe."""
    parts = _trainable_stages(network)
    return parts[_n_left(parts, recipe.unfreeze or "all") :]


def _n_left(parts: list[list[nn.Parameter]], unfreeze: str) -> int:
    """How many stages, the first ones, are left as they are in all epochs.

    Those that hold few parameters see the largest maps, so that their gradients are a seventh to a third of a convolutional
    network's step, and what they compute fits most pictures: those who train detectors leave them as they are (Girshick 2015, Fast
    R-CNN; Detectron2's ``FREEZE_AT``), and the first layer of a transformer is better left (Kumar et al. 2024, How to fine-tune
    vision models with SGD). Few images that are no photographs lose by it, unless they train at first (benchmarks/LOG.md, "Which
    recipe").
    """
    if unfreeze in ("head", "last-stage"):
        return len(parts) - (unfreeze == "last-stage")
    sizes = [sum(map(_size, stage)) for stage in parts]
    return sum(size <= _LEFT.get(unfreeze, 0.0) * sum(sizes) for size in itertools.accumulate(sizes))


def unfreeze(network: Network, recipe: Recipe, *, epoch: int) -> None:
    """Set which parameters train during ``epoch`` (from 0), as the recipe says."""
    parts = _stages_to_train(network, recipe)
    epochs, opened = recipe.epochs or 1, len(parts)
    if recipe.unfreeze == "gradual":
        opened = _opened(len(parts), epoch, epochs)
    elif recipe.unfreeze == "freezeout":
        depths = [depth for depth, n in recipe.phases(epochs).items() for _ in range(n)]
        opened -= _n_left(parts, depths[epoch])
    network.backbone.requires_grad_(False)
    network.head.requires_grad_(True)
    for stage in parts[len(parts) - opened :]:
        for parameter in stage:
            parameter.requires_grad_(True)


def _opened(n_stages: int, epoch: int, epochs: int) -> int:
    """Gradual unfreezing: the head alone at first, everything from the middle of the run on."""
    return min(n_stages, round(n_stages * epoch / (epochs // 2))) if epochs > 1 else n_stages


def training_mode(network: Network, recipe: Recipe) -> None:
    """Switch the head to training; the backbone behaves as in prediction, but for what the recipe switches on where it trains.

    Dropout and drop path of the backbone are those of its own pre-training. The cached head never saw them, so that with
    them the first step would start from another network than the one that was compared with it.
    """
    network.train()
    opened = any(parameter.requires_grad for parameter in network.backbone.parameters())
    network.backbone.train(opened and recipe.backbone_dropout)
    for module in network.backbone.modules():
        if isinstance(module, _BatchNorm):
            trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            module.train(recipe.batchnorm == "train" and trains)
        elif isinstance(module, DropPath) and recipe.drop_path:
            module.train(opened)
        elif _REMEMBERED in vars(module):
            module.training = opened  # it alone, which then computes anew what it would remember of its weights


def set_drop_path(backbone: nn.Module, rate: float) -> int:
    """Let training drop residual branches; returns the number of blocks that have a place for it.

    The rate grows evenly from 0 at the first block to ``rate`` at the last. Libraries mark the place by a module of their
    own or, where the network was built without a rate, by an identity of that name.
    """
    places = [
        (block, name)
        for block in backbone.modules()
        for name, child in block.named_children()
        if type(child).__name__ in ("DropPath", "StochasticDepth")
        or (name.startswith("drop_path") and isinstance(child, nn.Identity))
    ]
    blocks = list(dict.fromkeys(block for block, _ in places))
    for block, name in places:
        setattr(block, name, DropPath(rate * blocks.index(block) / max(1, len(blocks) - 1)))
    return len(blocks)


def parameter_groups(network: Network, recipe: Recipe) -> list[dict[str, Any]]:
    """The optimizer's groups: head and stages, each with its learning rate; norms and biases without weight decay."""
    matrices = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, _WITH_WEIGHTS)
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("weight")
    }
    parts = _stages_to_train(network, recipe)
    peak, decay = recipe.backbone_lr or 0.0, 1.0 if recipe.layer_decay is None else recipe.layer_decay
    rated = [(list(network.head.parameters()), recipe.lr)]
    rated += [(stage, peak * decay**depth) for depth, stage in enumerate(parts[::-1])]
    groups = []
    for parameters, lr in rated:
        for decayed in (True, False):
            chosen = [p for p in parameters if (id(p) in matrices) == decayed]
            if chosen:
                decay = recipe.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return groups


def has_batch_norms(module: nn.Module) -> bool:
    """Whether any of its modules is a batch norm."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def count_parameters(network: Network, recipe: Recipe) -> tuple[int, int]:
    """(all, those that the recipe ever trains)."""
    total = sum(parameter.numel() for parameter in network.parameters())
    trainable = sum(p.numel() for group in parameter_groups(network, recipe) for p in group["params"])
    return total, trainable
