import os

# transformers advises installing torch, which jaxtune never uses.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
