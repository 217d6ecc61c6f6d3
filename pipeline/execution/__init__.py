"""Work shared by threads, processes and jobs: pools, retries, progress, signals."""
