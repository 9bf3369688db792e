"""Evaluating: `evaluate(EvaluateConfig(...), endpoint) -> EvaluateReport`.

run.py is the stage; reference.py reads the pictures to compare with; client.py draws from a running deployment;
measures.py has the figures, as functions of pictures.
"""

from pipelines.evaluate.run import EvaluateConfig, EvaluatePlan, EvaluateReport, evaluate, plan

__all__ = ["EvaluateConfig", "EvaluatePlan", "EvaluateReport", "evaluate", "plan"]
