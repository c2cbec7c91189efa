"""One replica group of the rival's job: the same model and data as training_worker.py, the same reports.

Gradients go through `Manager.allreduce` as one flat tensor: with its DistributedDataParallel on Gloo every survivor of
a kill crashes in the communication hook. Arguments: lighthouse address, group, and the Gloo timeout in seconds.
"""

import sys

import torch
import torch.distributed as dist
from rival import manager
from torch.nn import functional as F
from training_worker import report

from everstep.demo.gpt import GPT, GPTConfig
from everstep.demo.text import standard_library_text
from everstep.demo.worker import BATCH_SIZE, LEARNING_RATE, Windows


def main() -> None:
    address, group, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    config = GPTConfig()
    data = Windows(standard_library_text(), config.context)
    net = GPT(config)
    inner = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)

    def save() -> dict[str, object]:
        return {"model": net.state_dict(), "optimizer": inner.state_dict()}

    def load(state: dict[str, dict[str, object]]) -> None:
        net.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    options = {"state_dict": save, "load_state_dict": load, "timeout_s": timeout_s}
    with manager(address, group, store.port, **options) as managing:
        generator = torch.Generator().manual_seed(group)
        while True:
            picked = torch.randint(len(data), (BATCH_SIZE,), generator=generator).tolist()
            tokens, targets = (torch.stack(part) for part in zip(*(data[i] for i in picked), strict=True))
            managing.start_quorum()
            inner.zero_grad()
            F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            managing.allreduce(flat).wait()
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            committed = managing.should_commit()
            if committed:
                inner.step()
            report(
                "step",
                step=managing.current_step(),
                committed=committed,
                participants=managing.num_participants(),
            )


if __name__ == "__main__":
    main()
