"""Data, evaluation and reports shared by the recipes; nothing here is imported by `kalman_peft` itself.

Modules: `offline` (files of PyPI packages), `targets` and `sources` (data to learn and to keep), `choices` (multiple
choice), `labelled`, `images` and `streams` (classification), `vit` (a small model), `prequential` and `online_report`
(one pass over a stream), `image_tasks` and `continual_methods` (task after task), `encoding` (text to labels),
`evaluate` (losses, choices, KL), `answers` (final answers), `methods` (of fine-tuning, by name), `report` (JSON),
`tables` and `plots`.
"""
