"""What a training script uses: the Manager, DistributedDataParallel, Optimizer and DistributedSampler."""
