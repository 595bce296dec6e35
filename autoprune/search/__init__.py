"""The search: spaces, the ask/tell study, the front, its validation and export. Only here may optuna be imported."""
