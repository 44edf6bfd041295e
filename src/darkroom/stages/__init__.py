"""The stages of dvc.yaml: each reads its parameters, calls the library and writes its outputs."""
