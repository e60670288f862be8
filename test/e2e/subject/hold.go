package main

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"
)

// hold keeps so many MiB of memory that nothing makes smaller, and tells at /held a
// checksum of them, as they are when it is asked.
func hold(ctx context.Context, text string) error {
	mib, err := strconv.Atoi(text)
	if err != nil || mib <= 0 {
		return fmt.Errorf("hold %q: it is no number of MiB", text)
	}
	var seed [32]byte
	crand.Read(seed[:]) // never fails
	memory := make([]byte, mib<<20)
	rand.NewChaCha8(seed).Read(memory) // never fails
	table := crc32.MakeTable(crc32.Castagnoli)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /held", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "%08x", crc32.Checksum(memory, table)) })
	listener, err := listenTCP(ctx, address)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() {
		<-ctx.Done()
		_ = server.Close()
	}()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
