"""What modifies sampling: guidance, inpainting, linear inverse problems, and the files that a request names."""
