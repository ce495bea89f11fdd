"""What other threads must leave alone while a CUDA graph is recorded."""

import threading

# Held while a graph is recorded (models/block_graphs.py) and while a thread beside the main one
# takes page-locked memory: CUDA breaks a recording off when any thread allocates meanwhile.
NOT_WHILE_RECORDING = threading.Lock()
