"""Containers, one a file or folder: each holds a `converter` (see `edgeport.seams.Converter`)."""
