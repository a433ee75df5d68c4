"""Number formats, one a file: each holds a `codec` (see `edgeport.seams.Codec`)."""
