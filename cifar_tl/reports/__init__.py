"""Pages, figures and tables of runs, drawn from what `runs` reads; nothing here imports torch."""
