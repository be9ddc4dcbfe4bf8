"""The reference's own files, read and written with its keys, order and rounding.

`synthetic` data sets with completions; `results` of single passages; `sft` rows; `cpt` results;
`continual` summaries; `wire` one inner loop's request and reply. Statistics are recomputed from
the records below them, so every `overall` block can be checked.
"""
