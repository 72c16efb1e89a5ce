"""Sources of rows and columns that `data pack` reads: parquet, Hugging Face folders, and files of named arrays."""
