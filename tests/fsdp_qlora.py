"""Two processes share a 4-bit Mixtral with LoRA by FSDP2: torchrun --nproc-per-node 2 fsdp_qlora.py
DIR. Loss and gradients are those of one process, and each holds half of the 4-bit weights."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cmixtral_nb.loading import load_model
from cmixtral_nb.qlora import add_lora


def step(net, ids):
    "Loss, and the gradient of each trained parameter, whole"
    loss = net(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            grads[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return loss.item(), grads


def local_bytes(net):
    "Bytes of the experts' 4-bit weights in this process"
    held = [p for name, p in net.named_parameters() if "base_layer" in name and ".experts." in name]
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in held)


def main(folder):
    dist.init_process_group("gloo")
    how: dict[str, Any] = dict(load_in_4bit=True, device="cpu", trainable=True)
    nets = [add_lora(load_model(folder, **how), 4, 8, 0.0, "none").train() for _ in range(2)]
    ids = torch.arange(40)[None] % 90
    whole, shared = nets
    loss, grads = step(whole, ids)
    all_bytes = local_bytes(whole)
    mesh = init_device_mesh("cpu", (2,))
    for layer in shared.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(shared, mesh=mesh)
    found, found_grads = step(shared, ids)
    assert found == loss and found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-5, atol=1e-7)
    assert local_bytes(shared) == all_bytes / 2, (local_bytes(shared), all_bytes)
    if dist.get_rank() == 0:
        print(f"equal, {len(grads)} gradients")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
