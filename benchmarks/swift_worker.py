"""One long `swift sft` that stands still between rounds; run by bench_vqa.py with the python of ms-swift's own venv.

Its arguments are those of `swift sft`. After the first optimizer step, which is not timed, it prints what it trained and
read; then for each {"steps": N, "warm": W, "weights": FILE} on stdin it runs W steps off the clock and N on it, prints their
seconds and the peak memory, and writes what it trains to FILE where one is named. Such lines begin with @@.

With `--attn_impl flash_attention_2` and no package flash_attn (it is published as source that takes long to build), torch's
own FlashAttention-2 kernels stand in under its name.
"""

import functools
import importlib.machinery
import importlib.util
import json
import sys
import time
import types
from importlib.metadata import version

import torch
import transformers
from common import peak_memory
from safetensors.torch import save_file
from transformers import TrainerCallback


def reply(**found) -> None:
    print("@@" + json.dumps(found), flush=True)


def flash_attention_of_torch() -> None:
    """A module `flash_attn`, as far as transformers calls it, of `torch.ops.aten._flash_attention_forward`."""

    def call(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout_p, softmax_scale, causal):
        lengths = (cu_q, cu_k, int(longest_q), int(longest_k))
        return torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, dropout_p, causal, return_debug_mask=False, scale=softmax_scale
        )[0]

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        return call(q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, softmax_scale, causal)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return call(q, k, v, *lengths, dropout_p, softmax_scale, causal)

    from transformers import modeling_flash_attention_utils as flash
    from transformers.utils import import_utils

    made = {"flash_attn": types.ModuleType("flash_attn"), "flash_attn.bert_padding": types.ModuleType("bert_padding")}
    for name, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "flash_attn")
    package, padding = made.values()
    package.__version__, package.__path__ = "2.8.3", []
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = flash._pad_input, flash._unpad_input
    sys.modules |= made
    import_utils.PACKAGE_DISTRIBUTION_MAPPING["flash_attn"] = ["flash-attn"]


class Rounds(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **_):
        self.seen, self.left, self.model = {}, 0, model
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        kinds = sorted({f"{'LoRA' if p.requires_grad else 'base'} {p.dtype}" for p in model.parameters()})
        self.what = {
            "version": version("ms-swift"),
            "trained": trained,
            "dtypes": kinds,
            "threads": torch.get_num_threads(),
        }
        # Before ms-swift's own hook, which turns token ids and images into embeddings.
        self.hooks = [
            model.register_forward_pre_hook(self._input, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._output),
        ]

    def _input(self, module, args, kwargs):
        for name in ("input_ids", "labels"):
            if name not in self.seen and kwargs.get(name) is not None:
                self.seen[name] = kwargs[name].tolist()

    def _output(self, module, args, output):
        if "logits" not in self.seen:
            self.seen["logits"], self.first_logits = list(output.logits.shape), output.logits.detach().float().cpu()

    def _first_loss(self) -> float:
        """Mean cross entropy of the first micro-batch, from its logits as they came."""
        labels = torch.tensor(self.seen["labels"])
        return torch.nn.functional.cross_entropy(
            self.first_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        ).item()

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other sides run on the same card
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        asked = json.loads(line)
        self.total, self.warm, self.weights = asked["steps"], asked["warm"], asked["weights"]
        self.left = self.total + self.warm
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == 1:
            for hook in self.hooks:
                hook.remove()
            reply(**self.what, **self.seen, loss_rows=self._first_loss())
            del self.first_logits
            self._wait()
            return
        self.left -= 1
        if self.left == self.total:  # the last one off the clock
            self.start = time.perf_counter()
        if self.left == 0:
            seconds, device = time.perf_counter() - self.start, "cuda" if torch.cuda.is_available() else "cpu"
            if self.weights:
                trained = {
                    n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad
                }
                save_file(trained, self.weights)
            reply(seconds=seconds, steps=self.total, peak=peak_memory(device))
            self._wait()


if __name__ == "__main__":
    if "flash_attention_2" in sys.argv and importlib.util.find_spec("flash_attn") is None:
        flash_attention_of_torch()
    from swift import sft_main

    prepare = transformers.Trainer.__init__

    @functools.wraps(prepare)  # ms-swift looks at the signature
    def prepare_and_watch(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        self.add_callback(Rounds)

    transformers.Trainer.__init__ = prepare_and_watch
    sft_main(sys.argv[1:])
