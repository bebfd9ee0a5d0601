"""A network ↔ a repository of the Hugging Face Hub: the files that `EarlyExitNet.save` writes, and a model card."""
