#!/bin/sh
# A virtual environment for a peer: install.sh modelopt|torch_pruning FOLDER makes FOLDER/NAME.
# torchprofile goes in without its dependencies: they name torchvision, which nothing here needs.
set -eu
python=${PYTHON:-python3}
pip="$2/$1/bin/python -m pip --disable-pip-version-check -q install"
case $1 in
modelopt) set -- "$@" nvidia-modelopt==0.47.0 transformers==5.14.1 accelerate==1.15.0 requests ;;
torch_pruning) set -- "$@" torch-pruning==1.6.1 transformers==5.23.0 ;;
*) echo "usage: install.sh modelopt|torch_pruning FOLDER" >&2 && exit 2 ;;
esac
"$python" -m venv "$2/$1"
shift 2
$pip torch==2.13.0
$pip torchprofile==0.0.4 --no-deps
$pip torch==2.13.0 safetensors numpy "$@"
