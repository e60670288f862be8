// programs are the zoo's own: what goroutines do, and what an io_uring does.
//
//	programs goroutines | io-uring    serves its state on loopback
//	programs ask                      prints it
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
)

const address = "127.0.0.1:8080"

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: programs goroutines | io-uring | ask")
	}
	var tell func() string
	var err error
	switch os.Args[1] {
	case "ask":
		if err := ask(); err != nil {
			log.Fatal(err)
		}
		return
	case "goroutines":
		tell, err = goroutines()
	case "io-uring":
		tell, err = ioUring()
	default:
		err = fmt.Errorf("there is no program %s", os.Args[1])
	}
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, tell()) })))
}

func ask() error {
	response, err := http.Get("http://" + address)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(os.Stdout, response.Body)
	return err
}
