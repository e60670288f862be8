# The demo. Included by the Makefile in the root.
#   make demo            show the main job and leave nothing behind
#   make demo KEEP=1     leave the cluster, and print how to go on
#   make demo NODES=2

.PHONY: demo
NODES ?= 1
KEEP ?=

demo: programs images ## Checkpoint a running Pod and restore it twice, on a cluster of its own
	go run ./demo/cmd/demo -nodes=$(NODES) -keep=$(if $(filter-out 0 no false,$(KEEP)),true,false)
