"""One long `swift sft` that stands still between rounds; run by bench_vqa.py with the python of ms-swift's own venv.

Its arguments are those of `swift sft`. After the first optimizer step, which is not timed, it prints what it trained and
read; then for each {"steps": N, "warm": W, "weights": FILE} on stdin it runs W steps off the clock and N on it, prints their
seconds and the peak memory, and writes what it trains to FILE where one is named. Such lines begin with @@.
"""

import functools
import json
import sys
import time
from importlib.metadata import version

import torch
import transformers
from common import peak_memory
from safetensors.torch import save_file
from transformers import TrainerCallback


def reply(**found) -> None:
    print("@@" + json.dumps(found), flush=True)


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
    from swift import sft_main

    prepare = transformers.Trainer.__init__

    @functools.wraps(prepare)  # ms-swift looks at the signature
    def prepare_and_watch(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        self.add_callback(Rounds)

    transformers.Trainer.__init__ = prepare_and_watch
    sft_main(sys.argv[1:])
