"""Other people's files: their configs, weights and tokenizers, a file a format. Importing the package loads nothing."""
