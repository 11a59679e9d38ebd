"""The benchmark behind ``python -m sgdcore bench``: whole optimizer steps, ours beside everybody else's.

`cases` says what is measured, `contenders` who takes part (to add one, write a few lines there), `training` measures
whole training steps, `cuda` steps on a CUDA device, `measure` takes the times, `stats` says how sure they are, `report`
and `plot` show them, `command` is the command line.
"""
