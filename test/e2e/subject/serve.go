package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"time"
)

// address is where it serves; a second one in a Pod has another.
var address = cmp.Or(os.Getenv("SUBJECT_ADDRESS"), ":8080")

// get asks the subject that runs in the same Pod.
func get(path string) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://127.0.0.1" + address + path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(os.Stdout, response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// serve builds the state up and answers questions about it until ctx ends.
func serve(ctx context.Context) error {
	if err := makeFiles(); err != nil {
		return fmt.Errorf("making files: %w", err)
	}
	state, err := newState(ctx)
	if err != nil {
		return fmt.Errorf("building the state up: %w", err)
	}
	var ill atomic.Bool
	mux := http.NewServeMux()
	mux.HandleFunc("GET /state", func(w http.ResponseWriter, _ *http.Request) { answer(w, state.report) })
	mux.HandleFunc("GET /files", func(w http.ResponseWriter, _ *http.Request) { answer(w, reportFiles) })
	mux.HandleFunc("GET /drain", func(w http.ResponseWriter, _ *http.Request) { answer(w, state.drain) })
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if ill.Load() {
			http.Error(w, "ill", http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /fall-ill", func(http.ResponseWriter, *http.Request) { ill.Store(true) })
	mux.HandleFunc("GET /exit", func(_ http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.FormValue("code"))
		if err != nil {
			code = 99
		}
		os.Exit(code)
	})
	server := &http.Server{Addr: address, Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	server.SetKeepAlivesEnabled(false)
	listener, err := listenTCP(ctx, address)
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	fmt.Println("subject: serving, nonce", state.nonce)
	for ticks := 0; ; ticks++ {
		select {
		case err := <-failed:
			return err
		case <-ctx.Done():
			fmt.Println("subject: asked to end, nonce", state.nonce)
			time.Sleep(500 * time.Millisecond) // so that being killed instead would show
			fmt.Println("subject: ended in order")
			return nil
		case <-time.After(100 * time.Millisecond):
			fmt.Println("subject: tick", ticks)
		}
	}
}

func answer[T any](w http.ResponseWriter, ask func() (T, error)) {
	report, err := ask()
	if err == nil {
		err = json.NewEncoder(w).Encode(report)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}
