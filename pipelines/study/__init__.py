"""Studies: many arms of one question, a table and plots of them. They compose the stages; no stage imports them.

config.py is what all share; arms.py remembers what is done; quality.py and drawing.py draw and measure pictures on Ray;
training.py trains an arm; table.py and outcome.py write what came of it; sweep.py, latent_vs_pixel.py and scaling.py
are the studies.
"""
