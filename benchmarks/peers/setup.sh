#!/bin/sh
# Make the environment of one peer:  setup.sh bergson|dattri-llm|cords|omp-gpu FOLDER
# The versions are those of the numbers in RESULTS.md; PYTHON names the interpreter (default python3).
set -eu

TORCH="torch==2.13.0"
case "${1:-}" in
bergson) set -- "$1" "$2" "transformers==5.23.0" "bergson==2.5.1" ;;
dattri-llm)
    set -- "$1" "$2" "transformers==5.23.0" "dattri-llm[transformers,attribution]==0.1.0" "dattri==0.3.0" "peft==0.21.2"
    ;;
cords) set -- "$1" "$2" "numpy==2.4.6" "scipy==1.17.1" ;;
omp-gpu) set -- "$1" "$2" "numpy==2.4.6" "orthogonal-matching-pursuit-gpu==0.1.3" ;;
*)
    echo "usage: $0 bergson|dattri-llm|cords|omp-gpu FOLDER" >&2
    exit 2
    ;;
esac

peer=$1
folder=$2
shift 2
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install "$TORCH"
"$folder/bin/python" -m pip install "$TORCH" "$@"
case "$peer" in
# bergson brings them in, built for another torch than the one here; transformers then fails to import them.
bergson | dattri-llm) "$folder/bin/python" -m pip uninstall --yes torchvision torchaudio ;;
# Its own requirements (ray, torchtext 0.10, PyYAML 5.4 and more) cannot be met beside this torch; its solver needs none.
cords) "$folder/bin/python" -m pip install --no-deps "cords==0.0.4" ;;
esac
