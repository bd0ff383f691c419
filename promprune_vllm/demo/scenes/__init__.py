"""Pictures that a small model can be asked about: drawn from a seed, with every question and its answer.

Importable without torch. The split decides which handwritten digits, which photographs behind the things and which
random numbers a scene is made of: no scene of "held-out" shares any of the three with one of "train".
"""

from promprune_vllm.demo.scenes.record import KINDS, PIXELS, SPLITS, TASKS, Question, Thing
from promprune_vllm.demo.scenes.scene import Scene, make_scene, pair_question

__all__ = ["KINDS", "PIXELS", "SPLITS", "TASKS", "Question", "Scene", "Thing", "make_scene", "pair_question"]
