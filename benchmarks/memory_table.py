"""GPU memory of train_match.py by base and by what is trained: computed from the real shapes, not measured.

    python benchmarks/memory_table.py [--scenes 32] [--pixels 256] [--texts 160] [--tokens 32]

Weights, gradients and AdamW state are exact (parameters are counted on the meta device, so no memory and no download is
needed). Activations are an estimate with gradient checkpointing: the input of every layer is kept, one layer is worked
on at a time. CUDA context and fragmentation come on top (1 to 2 GB); leave a fifth free.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

from model import LORA_TARGETS, TOWERS, DualEncoderSettings, add_lora

VISION_2_5 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
BASES = {  # shapes of the published configurations
    "Qwen2-VL-2B": Qwen2VLConfig(
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
        text_config={"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                     "num_key_value_heads": 2, "vocab_size": 151936},
    ),
    "Qwen2.5-VL-3B": Qwen2_5_VLConfig(
        vision_config=VISION_2_5 | {"out_hidden_size": 2048},
        text_config={"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                     "num_key_value_heads": 2, "vocab_size": 151936},
    ),
    "Qwen2.5-VL-7B": Qwen2_5_VLConfig(
        vision_config=VISION_2_5 | {"out_hidden_size": 3584},
        text_config={"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                     "num_key_value_heads": 4, "vocab_size": 152064},
    ),
}  # fmt: skip


def gigabytes(name: str, mode: str, scenes: int, pixels: int, texts: int, tokens: int) -> dict[str, float]:
    """GB (1e9 bytes) of weights, gradients + AdamW state, and activations, both towers trained in `mode`."""
    config = BASES[name]
    weights = state = activations = 0
    patches = scenes * (pixels // 28 * 2) ** 2
    rows = {"image": patches, "text": texts * tokens}
    for side, part in (("image", config.vision_config), ("text", config.text_config)):
        with torch.device("meta"):
            tower = TOWERS[config.model_type][side == "text"](part)
            tower.requires_grad_(mode == "full")
            if mode == "lora":
                settings = {f: 0 for f in DualEncoderSettings.__dataclass_fields__}
                add_lora(
                    tower, LORA_TARGETS[side], DualEncoderSettings(**settings | {"lora_rank": 16, "lora_alpha": 32})
                )
        trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
        kept = sum(p.numel() for p in tower.parameters()) - trained
        weights += 2 * kept + 4 * trained  # bfloat16 where frozen, float32 where trained
        state += 12 * trained  # gradient and two AdamW moments, float32
        if mode != "frozen":
            width = getattr(part, "embed_dim", part.hidden_size)
            inner = getattr(part, "intermediate_size", None) or width * part.mlp_ratio
            layers = getattr(part, "depth", None) or part.num_hidden_layers
            activations += 2 * rows[side] * (layers * width + 6 * width + 3 * inner)
    return {"weights": weights / 1e9, "gradients + AdamW": state / 1e9, "activations": activations / 1e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=32, help="images per batch and device")
    parser.add_argument("--pixels", type=int, default=256, help="side of an image, pixels")
    parser.add_argument("--texts", type=int, default=160, help="texts per batch and device")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per text")
    args = parser.parse_args()
    print(
        "| base | towers | weights | gradients + AdamW | activations | sum, GB |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in BASES:
        for mode in ("frozen", "lora", "full"):
            parts = gigabytes(name, mode, args.scenes, args.pixels, args.texts, args.tokens)
            cells = " | ".join(f"{value:.1f}" for value in [*parts.values(), sum(parts.values())])
            print(f"| {name} | {mode} | {cells} |")


if __name__ == "__main__":
    main()
