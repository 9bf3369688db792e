"""Evaluating: `evaluate(EvaluateConfig(...), endpoint) -> EvaluateReport`.

run.py is the stage; reference.py reads the pictures to compare with; drawing.py has those that are measured, drawn by
client.py (from a running deployment) or workers.py (on Ray);
measures.py has the figures, as functions of pictures.
"""

from pipelines.evaluate.run import EvaluateConfig, EvaluatePlan, EvaluateReport, evaluate, finished, plan

__all__ = ["EvaluateConfig", "EvaluatePlan", "EvaluateReport", "evaluate", "finished", "plan"]
