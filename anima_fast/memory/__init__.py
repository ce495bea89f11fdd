"""Trading time for memory: checkpointing, offloading, block swap, compilation by block."""
