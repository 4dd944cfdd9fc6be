"""A MoE layer under a plan, over the ranks of a torch.distributed process group."""
