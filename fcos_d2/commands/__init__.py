"""What ``fcos NAME`` runs, one module each; train_net.py and tools/ run the same."""
