"""Patch kinds, one a file: each holds a `patch_kind` (see `edgeport.seams.PatchKind`)."""
