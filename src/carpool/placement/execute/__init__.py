"""A MoE layer under a placement, over the ranks of a torch.distributed process group."""
