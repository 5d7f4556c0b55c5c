"""The weights of Hugging Face folders: their names, where they come from, and how a model is filled from them."""
