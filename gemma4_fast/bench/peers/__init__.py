"""One way to run Gemma 4 per file, each in a process of its own: see worker.py. Loaded by path, never imported from here."""
