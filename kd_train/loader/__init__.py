"""From the store to batches: samples, their order, threads that read ahead."""
