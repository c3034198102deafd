#!/bin/sh
# Make the environment of one peer:  setup.sh bergson|dattri-llm FOLDER
# The versions are those of the numbers in RESULTS.md; PYTHON names the interpreter (default python3).
set -eu

TORCH="torch==2.13.0"
case "${1:-}" in
bergson) set -- "$2" "bergson==2.5.1" ;;
dattri-llm) set -- "$2" "dattri-llm[transformers,attribution]==0.1.0" "dattri==0.3.0" "peft==0.21.2" ;;
*)
    echo "usage: $0 bergson|dattri-llm FOLDER" >&2
    exit 2
    ;;
esac

folder=$1
shift
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install "$TORCH"
"$folder/bin/python" -m pip install "$TORCH" "transformers==5.23.0" "$@"
# bergson brings them in, built for another torch than the one here; transformers then fails to import them.
"$folder/bin/python" -m pip uninstall --yes torchvision torchaudio
